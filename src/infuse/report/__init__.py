"""Reports: tables and figures in, one HTML page, PNG, CSV, JSON and Markdown out. Knows nothing of training."""

from infuse.report.model import Cell as Cell
from infuse.report.model import Column as Column
from infuse.report.model import Drawn as Drawn
from infuse.report.model import Lines as Lines
from infuse.report.model import Measured as Measured
from infuse.report.model import Point as Point
from infuse.report.model import Report as Report
from infuse.report.model import Scatter as Scatter
from infuse.report.model import Series as Series
from infuse.report.model import Table as Table
from infuse.report.write import put as put
from infuse.report.write import write as write

"""Reading, checking and splitting labelled texts."""

from infuse.data.check import check as check
from infuse.data.read import read as read
from infuse.data.rows import Rows as Rows
from infuse.data.rows import Splits as Splits
from infuse.data.rows import digest as digest
from infuse.data.split import few_shot as few_shot
from infuse.data.split import load_splits as load_splits
from infuse.data.split import splits_of as splits_of
from infuse.data.split import stratified as stratified

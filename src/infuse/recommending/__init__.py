"""Recommending: from constraints, and data if there is any, to a method, its settings and the reasons."""

from infuse.recommending.recommend import Recommendation as Recommendation
from infuse.recommending.recommend import recommend as recommend
from infuse.recommending.settings import RecommendConfig as RecommendConfig

__all__ = ["RecommendConfig", "Recommendation", "recommend"]

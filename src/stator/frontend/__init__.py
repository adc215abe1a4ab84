"""The Frontend: OpenAI's API over HTTP."""

from stator.frontend.app import FrontendApp
from stator.frontend.copies import FrontendCopies
from stator.frontend.health import health_of, models_of
from stator.frontend.namespaces import Namespaces
from stator.frontend.response_store import SharedResponseKeeper
from stator.frontend.server import FrontendServer

__all__ = [
    "FrontendApp",
    "FrontendCopies",
    "FrontendServer",
    "Namespaces",
    "SharedResponseKeeper",
    "health_of",
    "models_of",
]

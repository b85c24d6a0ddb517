from ..inference.conftest import *  # noqa: F403  # shared fixtures

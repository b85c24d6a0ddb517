from ..inference.conftest import *  # noqa: F403  # the models and settings that these tests share

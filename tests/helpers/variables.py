"""Sets variables of the environment, also those that the hub's client has read when it was imported."""

import os
from collections.abc import Mapping

from huggingface_hub import constants


def adopt(variables: Mapping[str, str]) -> None:
    """Adds variables to the environment of this process."""
    os.environ.update(variables)
    if endpoint := variables.get("HF_ENDPOINT"):
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint, endpoint + address
        constants.HF_HUB_DISABLE_XET = True

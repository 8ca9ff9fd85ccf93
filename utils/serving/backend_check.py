"""Looks at the backend once, before the gateway serves, and logs what will not work; it never stops the start.

The backend may be started later, and may serve several models; requests then show its own errors.
"""

from __future__ import annotations

import logging

from utils.client.completion import RetryPolicy
from utils.client.server_client import VllmClient
from utils.errors import ConfigError, ServerError
from utils.serving.settings import GatewaySettings

logger = logging.getLogger(__name__)

_TIMEOUT_S = 30.0


async def check_backend(settings: GatewaySettings, width: int) -> bool:
    """Try one row of latents on the backend's first model.

    Args:
        settings: Where the backend is.
        width: Columns of the rows that the gateway will send.

    Returns:
        Whether all is well.
    """
    async with VllmClient(
        settings.backend_url, api_key=settings.backend_key, timeout_s=_TIMEOUT_S, retry=RetryPolicy(attempts=1)
    ) as client:
        try:
            served = await client.models()
            client.model = served[0].name if served else None
            await client.preflight(width=width)
            joins_parts = await client.joins_parts()
        except (ServerError, ConfigError) as error:
            logger.warning("the backend is not ready: %s", error)
            return False
    if joins_parts:
        logger.warning(
            "the backend's chat template takes plain strings, so it puts a newline before and after every span: "
            "answers differ from the local prompt's; serve the decoder with a chat template that takes content parts"
        )
    return not joins_parts

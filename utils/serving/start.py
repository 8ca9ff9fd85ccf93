"""Loads what a gateway needs, looks at its backend, and serves: what would make the command's `--help` slow."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
from dataclasses import replace

from utils.client.completion import RetryPolicy
from utils.client.server_client import VllmClient
from utils.compress.compressor import Compressor
from utils.compress.select import Expansion
from utils.errors import ConfigError, ServerError
from utils.flags import encoder_settings, expansion, memory_limit, open_cache
from utils.serving.app import Gateway
from utils.serving.door import DoorPolicy
from utils.serving.local import LocalBackend
from utils.serving.request_options import REQUEST_POLICIES
from utils.serving.selected_text import TextSelector
from utils.serving.server import GatewayServer
from utils.serving.settings import GatewaySettings
from utils.serving.upstream import Upstream

logger = logging.getLogger(__name__)

_CHECK_TIMEOUT_S = 30.0


def serve(args: argparse.Namespace, settings: GatewaySettings) -> int:
    """Serve until a signal comes.

    Args:
        args: The command's flags: checkpoint, how it runs, cache, kind of backend, port.
        settings: Limits, keys and policies.

    Returns:
        The process's exit code.
    """
    # Before the weights are loaded.
    DoorPolicy(settings.host, settings.allowed_hosts, settings.allowed_origins)
    settings = replace(settings, expansion=default_expansion(args))
    gateway = text_gateway(args, settings) if args.backend == "text" else latents_gateway(args, settings)
    place = "its own decoder" if args.backend == "local" else settings.backend_url
    logger.info("gateway on http://%s:%d in front of %s", settings.host, args.port, place)
    app = gateway.app()
    # What was loaded stays: the collector need not go through it for each long body, while nothing else runs.
    gc.collect()
    gc.freeze()
    return GatewayServer(app, settings.connections, settings.host, args.port).run_process(os._exit)


def latents_gateway(args: argparse.Namespace, settings: GatewaySettings) -> Gateway:
    """A gateway whose backend reads latents."""
    encoder = encoder_settings(args)
    compressor = Compressor.load(
        args.checkpoint, chunk_size=args.chunk_size, settings=encoder, limit=memory_limit(args), cache=open_cache(args)
    )
    if args.backend == "local":
        return Gateway(settings, compressor, LocalBackend.load(compressor.files, encoder, settings.max_waiting))
    asyncio.run(check_server(settings, compressor.width))
    return Gateway(settings, compressor, Upstream(settings))


def text_gateway(args: argparse.Namespace, settings: GatewaySettings) -> Gateway:
    """A gateway whose backend reads text only."""
    gateway = Gateway(settings, TextSelector.load(args.checkpoint, memory_limit(args)), Upstream(settings))
    asyncio.run(check_server(settings, None))
    return gateway


def default_expansion(args: argparse.Namespace) -> Expansion | None:
    """What the flags say about requests that say nothing.

    Raises:
        ConfigError: Flags that cannot be.
    """
    wanted = expansion(args)
    if wanted is not None and wanted.policy not in REQUEST_POLICIES:
        raise ConfigError(f"--expand-policy must be one of {', '.join(REQUEST_POLICIES)}, got {wanted.policy}")
    return wanted


async def check_server(settings: GatewaySettings, width: int | None) -> None:
    """Try one row of latents on the server's first model, and log what will not work; it never stops the start.

    Without a width only whether it answers.

    The server may be started later, and may serve several models; requests then show its own errors.
    """
    once = RetryPolicy(attempts=1)
    async with VllmClient(
        settings.backend_url, api_key=settings.backend_key, timeout_s=_CHECK_TIMEOUT_S, retry=once
    ) as client:
        try:
            served = await client.models()
            if width is None:
                return
            client.model = served[0].name if served else None
            await client.preflight(width=width)
            joins_parts = await client.joins_parts()
        except (ServerError, ConfigError) as error:
            logger.warning("the backend is not ready: %s", error)
            return
    if joins_parts:
        logger.warning(
            "the backend's chat template takes plain strings, so it puts a newline before and after every span: "
            "answers differ from the local prompt's; serve the decoder with a chat template that takes content parts"
        )

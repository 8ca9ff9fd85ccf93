"""Start the gateway: an OpenAI-compatible server that compresses marked memory on its way to a vLLM server.

python -m utils.serving.gateway --backend-url http://127.0.0.1:8000 --port 8080
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from utils.cli import make_parser, run_command
from utils.errors import ConfigError
from utils.flags import add_cache_flags, add_checkpoint_flags, add_expand_flags, add_memory_limit_flags
from utils.serving.settings import DEFAULT_AUTO_TOKENS, DEFAULT_BACKEND_URL, GatewaySettings, is_loopback, read_keys

logger = logging.getLogger(__name__)

KEY_VARIABLE = "CODE_LLAVA_GATEWAY_KEY"


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.serving.gateway`."""
    parser = make_parser(
        "Serve an OpenAI-compatible API that compresses the memory in prompts for a vLLM server behind it.",
        examples="""\
  vllm serve checkpoints/code-llava-smollm2/llm --served-model-name code-llava --enable-prompt-embeds
  python -m utils.serving.gateway --backend-url http://127.0.0.1:8000
  python -m utils.serving.gateway --backend local      # no server needed; a page at http://127.0.0.1:8080/
  python -m utils.serving.gateway --backend text --backend-url http://127.0.0.1:11434/v1
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "code-llava",
    "messages": [{"role": "user", "content": "What is this? <|memory_start|>def f(): …<|memory_end|>"}]}'""",
        prog="python -m utils.serving.gateway",
    )
    add_checkpoint_flags(parser)
    add_memory_limit_flags(parser)
    add_expand_flags(parser)
    add_cache_flags(parser)
    backend = parser.add_argument_group("backend")
    backend.add_argument(
        "--backend", choices=("vllm", "local", "text"), default="vllm",
        help="a vLLM server; the checkpoint's decoder in this process, one request at a time; or any server, which "
        "gets selected text instead of latents, an eighth of the memory by default; default vllm",
    )  # fmt: skip
    backend.add_argument("--backend-url", help=f"the server; default {DEFAULT_BACKEND_URL}")
    backend.add_argument("--backend-key", help="its key; default $VLLM_API_KEY, else $OPENAI_API_KEY")
    backend.add_argument("--timeout", type=float, default=600.0, help="its longest silence in seconds; default 600")
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1",
        help="address to listen on; default 127.0.0.1, this machine only; any other needs a key",
    )  # fmt: skip
    server.add_argument("--port", type=int, default=8080, help="default 8080")
    server.add_argument(
        "--api-key", action="append", metavar="KEY",
        help="key that clients must send; give it again for another client, whose memories and cache entries are "
        f"apart; default ${KEY_VARIABLE} (several with commas), else none",
    )  # fmt: skip
    server.add_argument(
        "--allow-no-key", action="store_true", help="let everyone who reaches --host use the gateway without a key"
    )
    server.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="name under which clients may ask for the gateway, repeatable or with commas, such as "
        "host.docker.internal or *.example.org; default: loopback names on a loopback address, any name elsewhere",
    )  # fmt: skip
    server.add_argument(
        "--allowed-origin", action="append", default=[], metavar="URL",
        help="origin whose web pages may use the gateway, repeatable or with commas, such as http://localhost:3000; "
        "default: only its own page",
    )  # fmt: skip
    server.add_argument(
        "--on-error", choices=("fail", "plain-text"), default="fail",
        help="when the encoder fails: refuse, or send the memory as text and say so; default fail",
    )  # fmt: skip
    server.add_argument(
        "--auto-memory", type=int, nargs="?", const=DEFAULT_AUTO_TOKENS, metavar="TOKENS",
        help="let long parts of chats without markers become memory, from so many tokens on; never the last user "
        f"message; default off, {DEFAULT_AUTO_TOKENS} without a number",
    )  # fmt: skip
    server.add_argument("--max-body-mb", type=int, default=64, help="longest request body in MiB; default 64")
    server.add_argument("--max-spans", type=int, default=1024, help="most memory spans of a request; default 1024")
    server.add_argument("--max-waiting", type=int, default=256, help="requests waiting for the encoder; default 256")
    server.add_argument(
        "--max-batch-tokens", type=int, default=32768, help="memory tokens of requests encoded together; default 32768"
    )
    server.add_argument(
        "--memory-ttl", type=float, default=86400.0,
        help="how long a stored text is kept after its last use, in seconds; default 86400, a day",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    for flag in ("max_body_mb", "max_spans", "max_waiting", "max_batch_tokens"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.auto_memory is not None and args.auto_memory < 1:
        raise ConfigError(f"--auto-memory must be at least 1, got {args.auto_memory}")
    if args.backend == "local" and args.backend_url:
        raise ConfigError("--backend local answers in this process: leave --backend-url out")
    if args.backend == "text" and args.chunk_size is not None:
        raise ConfigError("--backend text sends no latents: leave --chunk-size out")
    settings = GatewaySettings(
        backend_url=args.backend_url or DEFAULT_BACKEND_URL,
        backend_key=args.backend_key,
        api_keys=read_keys(args.api_key, os.environ.get(KEY_VARIABLE), KEY_VARIABLE),
        host=args.host,
        allowed_hosts=_each(args.allowed_host),
        allowed_origins=_each(args.allowed_origin),
        on_error=args.on_error,
        auto_memory=args.auto_memory,
        max_body_bytes=args.max_body_mb << 20,
        max_spans=args.max_spans,
        max_waiting=args.max_waiting,
        max_batch_tokens=args.max_batch_tokens,
        memory_ttl_s=args.memory_ttl,
        timeout_s=args.timeout,
    )
    if not settings.api_keys and not is_loopback(args.host):
        if not args.allow_no_key:
            raise ConfigError(
                f"--host {args.host} is reached from other machines: set a key with --api-key or ${KEY_VARIABLE}, "
                "or say --allow-no-key"
            )
        logger.warning(
            "NO KEY: everyone who reaches %s can use this gateway, and so can every web page they open; "
            "set --api-key, or at least --allowed-host", args.host,
        )  # fmt: skip
    from utils.serving.start import serve

    return serve(args, settings)


def _each(values: list[str]) -> tuple[str, ...]:
    """The values of a flag that may be repeated or hold commas."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed by now. Python would take seconds more to take torch apart.
    os._exit(exit_code)

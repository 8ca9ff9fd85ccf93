"""RULER's `call_api.py`: answer the rows of one task, with the reference's flags.

Reads `<data_dir>/<task>/<subset>.jsonl`, writes `<save_dir>/<task>.jsonl`. `python -m ruler predict` does the same for
many tasks and lengths.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ruler.answering.predict import PredictJob, exit_code, predict, print_outcomes
from ruler.answering.protocol import BackendSettings
from ruler.registry import resolve_tasks
from utils.cli import make_parser, run_command
from utils.client.completion import RetryPolicy, Sampling
from utils.errors import ConfigError
from utils.flags import add_expand_flags, expansion

EXAMPLES = """\
  call_api.py --data_dir data/4096 --save_dir pred/4096 --task vt --server_type vllm --server_port 8000 \\
      --model_name_or_path my-model --temperature 0.0
  call_api.py --data_dir data/4096 --save_dir pred/4096 --task vt --server_type memory --chunk-size 8"""

# The reference's name of a server → our backend. The last two are ours.
SERVER_TYPES = {
    "vllm": "server-text",
    "sglang": "server-text",
    "trtllm": "server-text",
    "openai": "server-text",
    "hf": "local-text",
    "memory": "local-memory",
    "vllm-memory": "server-memory",
}
_UNSUPPORTED = ("nemo", "gemini", "mamba")


def build_parser() -> argparse.ArgumentParser:
    """Declare the reference's flags and ours."""
    parser = make_parser("Answer the rows of one task, with the reference's flags.", EXAMPLES)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", "--data-dir", type=Path, required=True, help="folder with <task>/<subset>.jsonl")
    data.add_argument("--save_dir", "--save-dir", type=Path, required=True, help="folder for <task>.jsonl")
    data.add_argument("--benchmark", default="synthetic", choices=("synthetic",), help="(default: synthetic)")
    data.add_argument("--task", required=True, help="task name")
    data.add_argument("--subset", default="validation", help="stem of the rows file (default: validation)")
    data.add_argument("--chunk_idx", "--chunk-idx", type=int, default=0, help="which slice of the rows (default: 0)")
    data.add_argument("--chunk_amount", "--chunk-amount", type=int, default=1, help="number of slices (default: 1)")
    server = parser.add_argument_group("server")
    server.add_argument("--server_type", "--server-type", default="vllm", choices=(*SERVER_TYPES, *_UNSUPPORTED),
                        help="vllm, sglang, trtllm: an OpenAI-compatible server; hf: a model in this process; memory, "
                        "vllm-memory: contexts as latents (default: vllm)")  # fmt: skip
    server.add_argument("--server_host", "--server-host", default="127.0.0.1", help="(default: 127.0.0.1)")
    server.add_argument("--server_port", "--server-port", default="5000", help="(default: 5000)")
    server.add_argument("--ssh_server", "--ssh-server", help="not supported: forward the port yourself (ssh -L)")
    server.add_argument("--ssh_key_path", "--ssh-key-path", help="not supported")
    server.add_argument("--model_name_or_path", "--model-name-or-path", help="served name, or model or checkpoint "
                        "folder (default: the only model served, or the embedded default checkpoint)")  # fmt: skip
    server.add_argument("--chunk-size", type=int, help="memory: encoder tokens a latent (default: the checkpoint's)")
    server.add_argument("--checkpoint", help="vllm-memory: the encoder's checkpoint (default: the embedded one)")
    server.add_argument("--timeout", "--timeout-s", type=float, default=600.0, help="seconds a request (default: 600)")
    add_expand_flags(parser)
    sampling = parser.add_argument_group("inference")
    sampling.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1.0)")
    sampling.add_argument("--top_k", "--top-k", type=int, default=32, help="0 is no limit (default: 32)")
    sampling.add_argument("--top_p", "--top-p", type=float, default=1.0, help="(default: 1.0)")
    sampling.add_argument("--random_seed", "--random-seed", type=int, default=0, help="(default: 0)")
    sampling.add_argument("--stop_words", "--stop-words", default="", help="strings that end an answer, with commas")
    sampling.add_argument("--sliding_window_size", "--sliding-window-size", type=int, help="not supported")
    sampling.add_argument("--threads", type=int, default=4, help="requests in flight (default: 4)")
    sampling.add_argument("--batch_size", "--batch-size", type=int, default=1, help="rows a forward pass of a local "
                          "model (default: 1)")  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    """Answer the rows; exit code 3 when some failed."""
    for flag in ("ssh_server", "ssh_key_path", "sliding_window_size"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag} is not supported: leave it out")
    if args.server_type in _UNSUPPORTED:
        raise ConfigError(
            f"--server_type {args.server_type} is not supported: put the model behind an OpenAI-compatible server and "
            "take vllm or openai"
        )
    if args.threads < 1 or args.batch_size < 1 or not 0 <= args.chunk_idx < args.chunk_amount:
        raise ConfigError("--threads, --batch_size and --chunk_amount must be positive, 0 <= chunk_idx < chunk_amount")
    is_openai = args.server_type == "openai"
    local_url = f"http://{args.server_host}:{args.server_port}"
    settings = BackendSettings(
        name=SERVER_TYPES[args.server_type],
        model=args.model_name_or_path,
        chunk_size=args.chunk_size,
        expansion=expansion(args),
        checkpoint=args.checkpoint,
        server_url=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1") if is_openai else local_url,
        # The hosted service has no completions for its chat models and no top_k.
        api="chat" if is_openai else "completions",
        concurrency=args.threads,
        batch_size=args.batch_size,
        timeout_s=args.timeout,
        sampling=Sampling(
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=0 if is_openai else args.top_k,
            seed=args.random_seed,
            stop=tuple(filter(None, args.stop_words.split(","))),
        ),
    )
    job = PredictJob(
        data_dir=args.data_dir,
        output_dir=args.save_dir,
        tasks=resolve_tasks(args.task),
        subset=args.subset,
        chunk_index=args.chunk_idx,
        num_chunks=args.chunk_amount,
        keep_input=True,
    )
    outcomes = predict(job, settings, RetryPolicy())
    print_outcomes(outcomes)
    return exit_code(outcomes)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    return run_command(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

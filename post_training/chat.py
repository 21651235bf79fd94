"""Talk to a stage's model:  python -m post_training.chat MODEL [--prompt TEXT]

MODEL is a run directory, its model/ folder or a hub id. Without --prompt: a conversation, one line a turn,
ended by an empty line or Ctrl-D.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from post_training.run import manifest
from post_training.run.directory import RunDirectory


def model_path(given: str) -> str:
    """The folder of a model. Raises ValueError for a run without a complete output."""
    folder = Path(given).expanduser()
    if not folder.exists():
        if given.startswith(("/", ".", "~")):
            raise ValueError(f"MODEL={given}: no such folder\n  fix: python -m launchers.compare says where models are")
        return given
    if (folder / "config.yaml").exists():
        folder = RunDirectory(folder).model
    if not (folder / "config.json").exists() or (folder.name == "model" and manifest.problem(folder)):
        raise ValueError(f"MODEL={given}: not a complete output\n  fix: python -m launchers.status shows what is done")
    return str(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--prompt", help="one question, answered and done")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer (default)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, tokens")
    args = parser.parse_args(argv)
    try:
        path = model_path(args.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def answer(messages: list[dict[str, str]]) -> str:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)
        sampling = (
            {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
        )
        with torch.no_grad():
            out = model.generate(
                **ids,
                **sampling,
                max_new_tokens=args.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    if args.prompt is not None:
        answer([{"role": "user", "content": args.prompt}])
        return 0
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not line:
            return 0
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(messages)})


if __name__ == "__main__":
    sys.exit(main())

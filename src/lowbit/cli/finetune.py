"""`lowbit finetune`."""

from typing import Annotated

import typer

from lowbit.cli.app import STDERR, STDOUT, app
from lowbit.cli.options import Device, Model, Out, Overwrite, Seed
from lowbit.finetuning import METHODS, Finetuning, finetune
from lowbit.model.select import Rule
from lowbit.numerics.scheme import GRAMMAR
from lowbit.terminal import Bar
from lowbit.train.loop import LoopOptions
from lowbit.train.qlora import LoraOptions


@app.command("finetune")
def finetune_command(
    model: Model,
    data: Annotated[str, typer.Option(help="Training text: .txt, .md or .jsonl.")],
    out: Out,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "qlora",
    scheme: Annotated[
        str | None, typer.Option(help=f"{GRAMMAR}; default: nf4-b64-dq for qlora, w4a16-g64 for qat.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: 2e-4 for qlora, 2e-5 for qat.")] = None,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 20,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option(help="Adapters are scaled by alpha / rank.")] = 32.0,
    target: Annotated[list[str], typer.Option(metavar="NAME", help="Adapt linears that end so; default: all.")] = [],  # noqa: B006
    ignore: Annotated[list[str], typer.Option(metavar="GLOB", help="Leave matching layers as they are.")] = [],  # noqa: B006
    rule: Annotated[list[str], typer.Option(metavar="GLOB=SCHEME", help="Another scheme for matching layers.")] = [],  # noqa: B006
    merge: Annotated[bool, typer.Option("--merge", help="Write a checkpoint with the adapter merged into it.")] = False,
    merge_16bit: Annotated[
        bool, typer.Option("--merge-16bit", help="Write a checkpoint in 16 bits with the adapter merged into it.")
    ] = False,
    next_token: Annotated[
        bool, typer.Option("--next-token", help="qat: learn the text's next tokens, not the original's answers.")
    ] = False,
    start: Annotated[
        str | None, typer.Option(metavar="METHOD", help="qat: quantize by this method first, and train from there.")
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="On CUDA: no graph of qat's steps, no compiling of qlora's blocks.")
    ] = False,
    keep_every: Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0: none.")] = 50,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Train MODEL in low precision: adapters on a 4-bit base (qlora), or 4-bit weights themselves (qat)."""
    loop = LoopOptions(steps=steps, batch=batch, warmup=warmup, keep_every=keep_every, seed=seed)
    lora = LoraOptions(rank, alpha, targets=tuple(target))
    rules = (*(Rule.parse(text) for text in rule), *(Rule(glob, None) for glob in ignore))
    options = Finetuning(
        method, scheme, lr, seq_len, not next_token, merge, merge_16bit, rules, lora, loop, eager, start
    )
    with Bar(STDERR) as bar:
        done = finetune(model, data, out, options, device, overwrite, bar.show)
    STDOUT.print(str(done), soft_wrap=True)
    STDOUT.print(f"wrote {out}", soft_wrap=True)

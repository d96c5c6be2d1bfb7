"""What graphquant would do to a model, linear by linear. Nothing is compiled.

    python -m graphquant explain my_module:make_model
    python -m graphquant explain path/to/model --batch 8 --json report.json

The model runs twice, in float.
"""

from __future__ import annotations

import argparse

import torch

import graphquant
from graphquant.cli.arguments import add_model, add_output, options, page, write_json
from graphquant.cli.models import load


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p)
    add_output(p, 140)


def run(args: argparse.Namespace) -> int:
    chosen = options(args)
    _, model, inputs = load(args)
    given, keywords = inputs(0)
    with torch.inference_mode():
        report = graphquant.explain(model, *given, options=chosen, **keywords)
    with page(args) as console:
        console.print(report)
    write_json(args, report.to_json())
    return 0

# SPDX-License-Identifier: Apache-2.0
import argparse
import json

from .console import print_json


def info(arguments: argparse.Namespace) -> None:
    """Say what a saved pipeline is made of, from its configs and the headers of its weights."""
    from ..pipeline_description import describe_pipeline

    description = describe_pipeline(arguments.model)
    if arguments.json:
        print_json(description)
        return
    print(f"{description['pipeline']} in {description['model']}\n")
    rows = [("component", "class", "parameters", "dtype", "on disk")]
    for name, component in description["components"].items():
        weights = component["weights"] or [{"variant": None, "parameters": None, "dtypes": {}, "bytes": None}]
        for weight in weights:
            rows.append(
                (
                    name if weight["variant"] is None else f"{name} ({weight['variant']})",
                    component["class"],
                    "" if weight["parameters"] is None else f"{weight['parameters']:,}",
                    ", ".join(weight["dtypes"]),
                    _size(component["bytes"] if weight["bytes"] is None else weight["bytes"]),
                )
            )
    rows.append(("all files", "", "", "", _size(description["bytes"])))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for name, class_name, parameters, dtypes, size in rows:
        left = f"{name:{widths[0]}}  {class_name:{widths[1]}}  {parameters:>{widths[2]}}"
        print(f"{left}  {dtypes:{widths[3]}}  {size:>{widths[4]}}")
    print()
    for schedule in description["schedules"]:
        scales = " ".join(str(side) for side in schedule["scales"])
        print(f"{schedule['pixels']} px in {len(schedule['scales'])} scales: {scales}")
    if description["num_classes"] is not None:
        print(f"{description['num_classes']} classes")
    for name, value in description["defaults"].items():
        print(f"{name}: {json.dumps(value)}")


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or folder of a pipeline")


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"

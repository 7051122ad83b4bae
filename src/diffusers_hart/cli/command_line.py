# SPDX-License-Identifier: Apache-2.0
import argparse

from .console import on_a_terminal, say
from .convert import add_convert_arguments, convert
from .generate import add_generate_arguments, generate
from .info import add_info_arguments, info
from .push import add_push_arguments, push
from .reconstruct import add_reconstruct_arguments, reconstruct


SUBCOMMANDS = {
    "generate": (generate, add_generate_arguments, "draw pictures from prompts"),
    "reconstruct": (reconstruct, add_reconstruct_arguments, "show what the tokenizer keeps of pictures"),
    "info": (info, add_info_arguments, "describe a model without drawing anything"),
    "convert": (convert, add_convert_arguments, "convert a checkpoint of the original"),
    "push": (push, add_push_arguments, "upload a pipeline to the Hub"),
}


def main(argv: list[str] | None = None) -> int:
    """
    The entry point. Results go to standard output, everything else to standard error.

    Args:
        argv (`list[str]`, *optional*): The arguments, those of the process by default.

    Returns:
        `int`: The exit code: 0, 1 after an error that is told in one line, 130 if interrupted. Wrong usage exits
        with 2.
    """
    import diffusers
    import transformers
    from huggingface_hub.errors import SafetensorsParsingError
    from safetensors import SafetensorError

    from .. import __version__

    parser = argparse.ArgumentParser("diffusers-hart", description="Draw pictures with HART.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, (command, add_arguments, summary) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=command.__doc__)
        add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print JSON")
        subparser.add_argument("--debug", action="store_true", help="show where an error comes from")
        subparser.set_defaults(command=command, parser=subparser)
    arguments = parser.parse_args(argv)
    if not on_a_terminal():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()  # and those of huggingface_hub
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        expected = isinstance(error, (ValueError, OSError, SafetensorsParsingError, SafetensorError))
        say(f"error: {error}" if expected else f"error: {type(error).__name__}: {error} (--debug shows where)")
        return 1
    return 0

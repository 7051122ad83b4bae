# SPDX-License-Identifier: Apache-2.0
import argparse

from .console import print_json


def push(arguments: argparse.Namespace) -> None:
    """Upload the folder of a pipeline to the Hub as it is; a repository without a model card gets one."""
    from ..folder_upload import push_folder

    address = push_folder(
        arguments.folder,
        arguments.repository,
        self_contained=arguments.self_contained,
        private=arguments.private or None,
        license=arguments.license,
        training_data=arguments.training_data,
        commit_message=arguments.message,
    )
    if arguments.json:
        print_json({"repository": arguments.repository, "commit": address})
    else:
        print(address)


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a pipeline")
    parser.add_argument("repository", help="id on the Hub, created if there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    parser.add_argument(
        "--self-contained", action="store_true", help="upload the code of the pipeline too, for diffusers alone"
    )
    parser.add_argument("--license", metavar="ID", help="licence of the weights, for the model card; never guessed")
    parser.add_argument("--training-data", metavar="TEXT", help="what they were trained on, for the model card")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")

# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, create_commit, create_repo

from .pipeline_description import describe_pipeline, pipeline_without_weights
from .pipelines.model_card import load_or_write_card
from .pipelines.self_contained import self_contained_code


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    self_contained: bool = False,
    private: bool | None = None,
    license: str | None = None,
    training_data: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    r"""
    Upload the folder of a HART pipeline to the Hub: its files as they are, without loading any weights. A repository
    without a model card gets one, unless the folder has one.

    Args:
        folder (`str` or `os.PathLike`): The folder; what is hidden in it stays there.
        repo_id (`str`): The repository, which is created if there is none.
        self_contained (`bool`, defaults to `False`):
            Whether to upload the code of the pipeline too, as [`HARTPipeline.save_pretrained`] writes it.
        private (`bool`, *optional*): Whether a new repository is private, by default what its owner has set.
        license (`str`, *optional*): Licence of the weights, for the model card. It is never guessed.
        training_data (`str`, *optional*): A sentence on what they were trained on, for the model card.
        token (`str`, *optional*): Access token, by default the one `huggingface_hub` is logged in with.
        commit_message (`str`, *optional*): Message of the commit.

    Returns:
        `str`: The address of the commit.

    Raises:
        ValueError: If it is not the folder of a HART pipeline; nothing has been uploaded then.
    """
    import diffusers_hart

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} to upload.")
    description = describe_pipeline(str(folder))
    pipe = pipeline_without_weights(folder, description)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {path: str(file) for path, file in files.items() if not any(p.startswith(".") for p in path.split("/"))}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if self_contained:
        classes = {
            name: getattr(diffusers_hart, component["class"])
            for name, component in description["components"].items()
            if component["library"] == diffusers_hart.__name__
        }
        code, entries = self_contained_code(type(pipe), classes)
        code["model_index.json"] = json.dumps(index | entries, indent=2) + "\n"
        files |= {path: text.encode() for path, text in code.items()}
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if "README.md" not in files:
        brings_code = self_contained or isinstance(index["_class_name"], list)
        card = load_or_write_card(pipe, repo_id, brings_code, license, training_data, token)
        files["README.md"] = str(card).encode()
    commit = create_commit(
        repo_id,
        [CommitOperationAdd(path, content) for path, content in files.items()],
        commit_message=commit_message or f"Upload {description['pipeline']}",
        token=token,
    )
    return commit.commit_url

# SPDX-License-Identifier: Apache-2.0
import inspect
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers.utils.torch_utils import is_compiled_module
from huggingface_hub import create_repo

from .model_card import load_or_write_card
from .self_contained import COMPONENTS, installed_index, is_remote_code, self_contained_code


class _AnyType(tuple):
    """What diffusers takes for the types of an argument without annotation, and every type is among."""

    def __new__(cls) -> "_AnyType":
        return super().__new__(cls, (inspect.Signature.empty,))

    def __contains__(self, item: Any) -> bool:
        return True


class HARTHubMixin:
    """
    What the HART pipelines add to saving and pushing of diffusers: folders that bring their code along, and a model
    card. It goes before `DiffusionPipeline` among the bases of a class.
    """

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **kwargs) -> dict[str, Any]:
        # What diffusers reads `model_index.json` with. The code that a folder brings along is for those who have no
        # such class installed; this one needs none of it, and so no trust.
        index = super()._dict_from_json_file(json_file, **kwargs)
        return index if is_remote_code(cls) else installed_index(index)

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        # Classes that come with a checkpoint are made anew for each component, so that none is the one that the code of
        # the pipeline has under its name, and diffusers would warn of each. The constructor checks the names.
        types = super()._get_signature_types()
        if not is_remote_code(cls):
            return types
        ours = {name for name, kinds in types.items() if any(kind.__name__ in COMPONENTS for kind in kinds)}
        return {name: _AnyType() if name in ours else kinds for name, kinds in types.items()}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        self_contained: bool = False,
        **kwargs,
    ) -> None:
        r"""
        Save the pipeline to a folder, as `DiffusionPipeline.save_pretrained` does.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, which is made if there is none.
            safe_serialization (`bool`, defaults to `True`): Whether to write safetensors rather than pickles.
            variant (`str`, *optional*): Variant of the files, such as `"fp16"`.
            max_shard_size (`int` or `str`, *optional*): Size above which weights are written in several files.
            push_to_hub (`bool`, defaults to `False`): Whether to upload the folder too, to `repo_id`.
            self_contained (`bool`, defaults to `False`):
                Whether to write the code of the pipeline beside its weights. Then
                `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads it without this package, and
                the pipelines of this package load it as any other. A pipeline that was itself loaded from such code is
                always saved so.
            kwargs (`dict`):
                Other arguments of diffusers and, with `push_to_hub`, those of [`~HARTHubMixin.push_to_hub`].

        Raises:
            ValueError: If the code of a component cannot be written; nothing has been written then.
        """
        push_options = {}
        if push_to_hub:
            names = ("repo_id", "commit_message", "private", "token", "create_pr", "license", "training_data")
            push_options = {name: kwargs.pop(name) for name in names if name in kwargs}
        self_contained = self_contained or is_remote_code(type(self))
        if self_contained:
            components = {name: component for name, component in self.components.items() if component is not None}
            classes = {
                name: type(component._orig_mod if is_compiled_module(component) else component)
                for name, component in components.items()
            }
            code, index = self_contained_code(type(self), classes)
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        if self_contained:
            index_path = Path(save_directory) / "model_index.json"
            index = json.loads(index_path.read_text(encoding="utf-8")) | index
            for path, text in code.items():
                (Path(save_directory) / path).write_text(text, encoding="utf-8")
            index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            repo_id = push_options.pop("repo_id", Path(save_directory).resolve().name)
            self._push_folder(save_directory, repo_id, self_contained, **push_options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        self_contained: bool = False,
        license: str | None = None,
        training_data: str | None = None,
    ) -> str:
        r"""
        Upload the pipeline to the Hub. A repository that has no model card gets one.

        Args:
            repo_id (`str`): The repository, which is created if there is none.
            commit_message (`str`, *optional*): Message of the commit.
            private (`bool`, *optional*): Whether a new repository is private, by default what its owner has set.
            token (`str`, *optional*): Access token, by default the one `huggingface_hub` is logged in with.
            create_pr (`bool`, defaults to `False`): Whether to open a pull request instead of committing.
            safe_serialization (`bool`, defaults to `True`): Whether to write safetensors rather than pickles.
            variant (`str`, *optional*): Variant of the files, such as `"fp16"`.
            subfolder (`str`, *optional*): Folder of the repository to upload to.
            self_contained (`bool`, defaults to `False`): As in [`~HARTHubMixin.save_pretrained`].
            license (`str`, *optional*):
                Licence of the weights, for the model card. It is never guessed: without one the card says so.
            training_data (`str`, *optional*): A sentence on what the weights were trained on, for the model card.

        Returns:
            `str`: The address of the commit.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, self_contained=self_contained)
            return self._push_folder(
                folder,
                repo_id,
                self_contained or is_remote_code(type(self)),
                commit_message,
                private,
                token,
                create_pr,
                license,
                training_data,
                subfolder,
            )

    def _push_folder(
        self,
        folder: str | os.PathLike,
        repo_id: str,
        self_contained: bool,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
        training_data: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if not subfolder:
            card = load_or_write_card(self, repo_id, self_contained, license, training_data, token)
            card.save(Path(folder) / "README.md")
        return self._upload_folder(
            folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr, subfolder=subfolder
        )

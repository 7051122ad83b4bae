# SPDX-License-Identifier: Apache-2.0
import os
from typing import Any


class OwnConfigMixin:
    """For schedulers that are not to be made of another kind's config, of which diffusers takes only what fits."""

    _identifying_value = ""

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As `ConfigMixin.load_config`; raises `ValueError` for the config of another kind of scheduler."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if cls._identifying_value not in config:
            origin = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
            raise ValueError(
                f"The config in {origin} is that of a {config.get('_class_name')} and no {cls.__name__}: it holds no "
                f"`{cls._identifying_value}`."
            )
        return loaded

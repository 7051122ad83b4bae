# SPDX-License-Identifier: Apache-2.0
import os
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading


class DiskOffloadMixin:
    """For pipelines that offload groups of layers to files; goes before `DiffusionPipeline`."""

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_to_disk_path: str | os.PathLike | None = None,
        exclude_modules: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        r"""
        Keep layers on another device, or on disk, until they are used, as `DiffusionPipeline.enable_group_offload`
        does. On disk every component has a folder of its own: files are named after layers, and the transformer and the
        residual MLP have some that are called the same.

        Args:
            onload_device (`torch.device`): Where to compute.
            offload_to_disk_path (`str` or `os.PathLike`, *optional*): Folder of the files, without which there are none.
            exclude_modules (`str` or `list[str]`, *optional*): Components that stay on `onload_device`.
            kwargs: What else diffusers' method takes, by name.
        """
        if offload_to_disk_path is None:
            super().enable_group_offload(onload_device, exclude_modules=exclude_modules, **kwargs)
            return
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        for name, component in self.components.items():
            if not isinstance(component, torch.nn.Module):
                continue
            if name in excluded:
                component.to(onload_device)
                continue
            options = {**kwargs, "offload_to_disk_path": os.path.join(offload_to_disk_path, name)}
            if hasattr(component, "enable_group_offload"):
                component.enable_group_offload(onload_device, **options)
            else:
                apply_group_offloading(component, onload_device, **options)

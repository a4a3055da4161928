"""Agreement between processes: masks are decided once and are the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from prunus.errors import DamagedFile, MaskMismatch
from prunus.masks import Masks


def world_size() -> int:
    """Return the number of cooperating processes (1 when torch.distributed is not running)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _device() -> torch.device:
    """Return where tensors must lie to be sent."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _broadcast_bytes(data: bytes | None, device: torch.device) -> bytes:
    length = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64, device=device)
    dist.broadcast(length, src=0)
    if data is not None:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    else:
        buffer = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(buffer, src=0)
    return bytes(buffer.cpu().numpy().tobytes())


def agree(masks: Masks) -> Masks:
    """Return rank 0's masks on every rank, checked by content hash; returns `masks` itself in a single process.

    Must be called by all ranks at the same point.

    Raises:
        MaskMismatch: a rank received something else than rank 0 sent; raised on every rank.
    """
    if world_size() == 1:
        return masks
    device = _device()
    sent = _broadcast_bytes(masks.to_bytes() if dist.get_rank() == 0 else None, device)
    try:
        agreed = Masks.from_bytes(sent, source="masks from rank 0")
        digest = agreed.digest()
    except DamagedFile:
        # A rank that stopped here would leave the others waiting for its digest: it sends one that fits nothing.
        agreed, digest = masks, "00" * 32
    own = torch.frombuffer(bytearray(bytes.fromhex(digest)), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    if any(not torch.equal(other, own) for other in everyone):
        raise MaskMismatch(
            "the ranks hold different masks after rank 0 sent its own; stop and restart from a checkpoint."
        )
    return agreed


def agree_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rank 0's values on every rank; returns the tensors themselves in a single process.

    Must be called by all ranks at the same point, with tensors of the same names, shapes and dtypes.
    """
    if world_size() == 1:
        return dict(tensors)
    agreed = {}
    for name, tensor in tensors.items():
        sent = tensor.detach().to(_device(), copy=True).contiguous()
        dist.broadcast(sent, src=0)
        agreed[name] = sent.to(tensor.device)
    return agreed

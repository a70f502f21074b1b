"""Counts the kernels that operations launch."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = {
    "aten._unsafe_view", "aten.alias", "aten.as_strided", "aten.detach", "aten.empty", "aten.empty_like",
    "aten.expand", "aten.permute", "aten.select", "aten.slice", "aten.split", "aten.squeeze", "aten.t",
    "aten.transpose", "aten.unbind", "aten.unsqueeze", "aten.view",
}  # fmt: skip


class KernelCount(TorchDispatchMode):
    """Counts operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name not in NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

"""What Triton's interpreter reads for a kernel, and what it leaves where a kernel asks for nothing."""

import numpy as np

try:
    from triton.runtime import interpreter
except ImportError:  # Windows, macOS
    interpreter = None


def poison_masked_loads(monkeypatch, read=None):
    """Fill with ones what a load without `other` leaves where its mask is false: NaN, 255 or -1; on a GPU, anything.

    The addresses of what is loaded are appended to `read`, an array for each load.
    """
    if interpreter is None:
        return
    load = interpreter.InterpreterBuilder.create_masked_load

    def poisoned(self, ptrs, mask, other, *rest):
        if read is not None:
            read.append(np.broadcast_to(ptrs.data, np.shape(mask.data))[mask.data.astype(bool)])
        if other is None:
            kind = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty()))
            ones = np.full((*ptrs.data.shape, kind.itemsize), 255, np.uint8).view(kind)[..., 0]
            other = interpreter.TensorHandle(ones, ptrs.get_element_ty())
        return load(self, ptrs, mask, other, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", poisoned)

"""How a teacher's answers become a loss: who is asked, which layers are compared, which channels of them."""

from compress.teaching.objective import (
    Distillation,
    Objective,
    Taught,
    objective,
    teach,
    with_more_images,
)

__all__ = ["Distillation", "Objective", "Taught", "objective", "teach", "with_more_images"]

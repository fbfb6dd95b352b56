"""`compress doctor`: what int8 will do to a network, found out before it is trained.

weights and activations   risks.py     layers whose numbers fit badly on 256 steps
runtimes                  kernels.py   operators that fall out of integer kernels, read back from the runtimes
widths                    widths.py    channel counts that are slow here, measured on single layers
sizes                     sizes.py     files as they are exported, and memory for activations
damage                    damage.py    what each layer's rounding alone does to the output
"""

from compress.doctor.diagnosis import Diagnosis, Refusal, Rewrite, as_json, examine
from compress.doctor.subject import Subject, examine_subject, from_factory, from_recipe, synthetic
from compress.doctor.text import Section, sections

__all__ = [
    "Diagnosis",
    "Refusal",
    "Rewrite",
    "Section",
    "Subject",
    "as_json",
    "examine",
    "examine_subject",
    "from_factory",
    "from_recipe",
    "sections",
    "synthetic",
]

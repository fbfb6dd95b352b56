"""What a student is taught with: one file per loss.

Each file holds the maths as plain functions and a settings class (`Term` for logits, `FeatureTerm` for what layers
return) that is called with a `Lesson`. To add one: its file, its name in `LossSettings`, one test.
"""

from typing import Annotated

from pydantic import Field

from compress.losses.activation_boundary import ActivationBoundary
from compress.losses.adversarial import Adversarial
from compress.losses.attention import Attention
from compress.losses.attention_gradient import AttentionGradient, GradientSymmetry
from compress.losses.binary_kd import BinarySoftTargets
from compress.losses.cc import CorrelationCongruence
from compress.losses.crd import CRD
from compress.losses.cwd import CWD
from compress.losses.dist import DIST
from compress.losses.dkd import DKD
from compress.losses.factor_transfer import FactorTransfer
from compress.losses.fitnets import FitNets
from compress.losses.fsp import FSP
from compress.losses.information_flow import InformationFlow
from compress.losses.irg import IRG
from compress.losses.kd import SoftTargets
from compress.losses.kd_svd import KDSVD
from compress.losses.l2 import LogitsL2
from compress.losses.mse import SquaredError
from compress.losses.nst import NST
from compress.losses.pkt import PKT
from compress.losses.rkd import RKD
from compress.losses.self_attention import SelfAttention
from compress.losses.similarity import Similarity
from compress.losses.soft_cross_entropy import SoftCrossEntropy
from compress.losses.teacher_free import TeacherFree
from compress.losses.vid import VID
from compress.losses.weights import Weights

LossSettings = Annotated[
    ActivationBoundary
    | Adversarial
    | Attention
    | AttentionGradient
    | BinarySoftTargets
    | CorrelationCongruence
    | CRD
    | CWD
    | DIST
    | DKD
    | FactorTransfer
    | FitNets
    | FSP
    | GradientSymmetry
    | InformationFlow
    | IRG
    | KDSVD
    | LogitsL2
    | NST
    | PKT
    | RKD
    | SelfAttention
    | Similarity
    | SoftCrossEntropy
    | SoftTargets
    | SquaredError
    | TeacherFree
    | VID
    | Weights,
    Field(discriminator="use"),
]

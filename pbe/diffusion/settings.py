"""Names of objectives, schedules and samplers in params.yaml. Imports nothing heavy, because every command reads it."""

from typing import Literal

Objective = Literal["x0", "eps", "v"]  # what the network predicts: pbe/diffusion/objective.py
BetaSchedule = Literal["squaredcos_cap_v2", "scaled_linear"]
SamplerName = Literal["pndm", "ddim", "dpm++", "unipc"]  # pndm: PLMS, as upstream

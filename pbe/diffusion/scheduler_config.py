"""The scheduler config of a new model, in diffusers' terms. Betas are always given: diffusers' defaults are not Stable
Diffusion's.
"""

from typing import Any

from pbe.diffusion.settings import BetaSchedule, Objective

TRAIN_TIMESTEPS = 1000  # upstream configs/v1.yaml
PREDICTION_TYPES: dict[Objective, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def scheduler_config(beta_schedule: BetaSchedule, objective: Objective) -> dict[str, Any]:
    """The scheduler config of a new model.

    scaled_linear: Stable Diffusion's (upstream calls it "linear", configs/v1.yaml), with the hub's PNDM settings.
    squaredcos_cap_v2: DDIM with trailing timesteps, so that sampling starts at the noisiest one.
    """
    stable_diffusion = beta_schedule == "scaled_linear"
    return {
        "_class_name": "PNDMScheduler" if stable_diffusion and objective != "x0" else "DDIMScheduler",
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": beta_schedule,
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": not stable_diffusion,
        "skip_prk_steps": True,
        "steps_offset": 1 if stable_diffusion else 0,
        "timestep_spacing": "leading" if stable_diffusion else "trailing",
        "prediction_type": PREDICTION_TYPES[objective],
    }

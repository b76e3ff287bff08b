"""Settings of the user study."""

from typing import Annotated

from pydantic import Field, model_validator

from pbe.evaluate.settings import VariantName
from pbe.settings import Float, Int, PositiveInt, Settings, refuse_duplicates

METHODS_MAX = 5  # Paper: five results side by side


class StudyConfig(Settings):
    methods: Annotated[tuple[VariantName, ...], Field(min_length=2, max_length=METHODS_MAX)] | None = Field(
        None,
        description="2 to 5 variants and baselines that people rank; null: the first five, without hole_kept. Paper: 5",
    )
    items: PositiveInt
    raters: Int = Field(ge=1, le=1000)
    items_per_rater: PositiveInt | None = Field(
        None, description="items that each rater sees; null: all. Every item is seen by equally many raters. Paper: all"
    )
    repeats: Int = Field(
        2, ge=0, description="items that each rater sees again at the end, for the agreement with oneself. Ours"
    )
    picture_px: Int = Field(
        384, ge=32, le=1024, description="px, longer side of the page's pictures; larger ones are scaled down. Ours"
    )
    max_page_mb: Float = Field(25, gt=0, description="MB, the largest page that is written: people send it. Ours")

    @model_validator(mode="after")
    def _fits_together(self) -> "StudyConfig":
        if self.methods is not None:
            refuse_duplicates("methods", self.methods)
        seen = self.items if self.items_per_rater is None else self.items_per_rater
        if seen > self.items:
            raise ValueError(f"items_per_rater: {seen} must be at most items, {self.items}")
        if self.repeats >= seen:
            raise ValueError(f"repeats: {self.repeats} must be less than the {seen} items that a rater sees")
        return self

"""One Hypothesis profile for the unit tests: no deadline for one example, since CI machines pause."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("unit", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("unit")

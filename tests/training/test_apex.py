"""`--update apex`, as far as it goes without NVIDIA's apex."""

import pytest
from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.apex import ApexSGD
from fastsnap.training.flat import FlatParameters


@pytest.mark.parametrize("own", [{"lr_scale": 0.5}, {"weight_decay": 0.0}])
def test_groups_whose_options_would_be_ignored_are_refused(own):
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="takes no groups with a weight_decay or lr_scale of their own"):
        ApexSGD(
            [{"params": list(net.parameters()), **own}],
            Schedule("snapshot", 10, 2, 0.1),
            momentum=0.9,
            weight_decay=1e-4,
            nesterov=True,
            flat=FlatParameters(net),
        )

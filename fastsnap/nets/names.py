"""What the name of a network means, and the nearest names for one that means nothing."""

import difflib
import re
from dataclasses import dataclass

from fastsnap.nets import foreign

SYNTAX = (
    "a net is resnet<6n+2>[x<width>], preresnet<6n+2>, wrn-<6n+4>-<width>, densenet-<3n+4>-<growth>, "
    "torchvision:<name> or timm:<name>"
)
EXAMPLES = (
    *("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet32x4"),
    *("preresnet20", "preresnet56", "preresnet110", "preresnet164", "wrn-16-4", "wrn-28-10", "wrn-40-4"),
    *("densenet-40-12", "densenet-100-12", "densenet-100-24"),
)
# Family: pattern, what depth minus the first number is divided by, least depth, a name of depth and second number.
FAMILIES = {
    "resnet": (r"resnet(\d{1,4})(?:x(\d{1,3}))?", 2, 6, 8),
    "preresnet": (r"preresnet(\d{1,4})", 2, 6, 8),
    "wrn": (r"wrn-(\d{1,4})-(\d{1,3})", 4, 6, 10),
    "densenet": (r"densenet-(\d{1,4})-(\d{1,3})", 4, 3, 7),
}
SMALL_IMAGES = 64  # pixels up to which the networks for small images are meant


@dataclass(frozen=True)
class NetName:
    """A network's name in parts.

    family  "resnet", "preresnet", "wrn", "densenet", "torchvision" or "timm"
    blocks  per stage, of the first four; width: the multiplier, or the growth of a DenseNet
    model   the library's name, of the last two
    """

    family: str
    blocks: int = 0
    width: int = 1
    model: str = ""

    @property
    def is_foreign(self) -> bool:
        """Whether another library makes it."""
        return self.family in foreign.LIBRARIES


def parse_name(name: str) -> NetName:
    """Raises ValueError, with the nearest names, for what is no network, and where its library is missing."""
    library, colon, model = name.partition(":")
    if colon and library in foreign.LIBRARIES:
        if library == "timm" and not foreign.has_timm():
            raise ValueError(f"net {name} {foreign.TIMM_MISSING}")
        if model in foreign.names(library):
            return NetName(library, model=model)
    for family, (pattern, first, step, least) in FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match:
            depth, width = int(match[1]), int((match.lastindex == 2 and match[2]) or 1)
            if depth >= least and (depth - first) % step == 0 and width >= 1:
                return NetName(family, (depth - first) // step, width)
    raise ValueError(f"unknown net {name!r}: {SYNTAX}; nearest: {', '.join(_nearest(name))}")


def note(name: str, image_size: tuple[int, int]) -> str | None:
    """What the summary of a run says of a network that is not what its name suggests on such images."""
    net = parse_name(name)
    if net.is_foreign or min(image_size) <= SMALL_IMAGES:
        return None
    text = f"{name} is a network for images of about 32 pixels"
    if name in foreign.names("torchvision"):
        text = f"{name} is the CIFAR network of that depth; ImageNet's is torchvision:{name}"
    return f"{text}; for {image_size[0]}x{image_size[1]} consider --stem-stride 2, --image-size or a net of torchvision"


def _nearest(name: str) -> list[str]:
    library, _, model = name.rpartition(":")
    if library in foreign.LIBRARIES:
        near = difflib.get_close_matches(model.lower(), foreign.names(library), n=3, cutoff=0.4)
        return [f"{library}:{found}" for found in near] or list(EXAMPLES)
    nearest = _of_family(name)
    if name in foreign.names("torchvision"):
        nearest.append(f"torchvision:{name}")
    nearest += [
        near for near in difflib.get_close_matches(name, EXAMPLES, n=2, cutoff=0.6) if near not in nearest
    ]
    if len(nearest) < 2:
        near = difflib.get_close_matches(name.lower(), foreign.names("torchvision"), n=2, cutoff=0.7)
        nearest += [f"torchvision:{found}" for found in near]
    return nearest or list(EXAMPLES)


def _of_family(name: str) -> list[str]:
    """Names of the same form whose depth can be."""
    for pattern, first, step, least in FAMILIES.values():
        match = re.fullmatch(pattern, name)
        if match:
            below = max(least, first + (int(match[1]) - first) // step * step)
            rest = name[match.end(1) :]
            start = name[: match.start(1)]
            rest = re.sub(r"(?<=[x-])0+$", "1", rest)
            return [f"{start}{depth}{rest}" for depth in (below, below + step)]
    return []

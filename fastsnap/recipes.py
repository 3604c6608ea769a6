"""What each data set is trained with where the user does not say otherwise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a data set is trained with where the user does not say otherwise."""

    net: str
    epochs: int
    learning_rate: float
    cycles: int = 5
    batch_size: int = 64
    augment: str = "crop"
    stem_stride: int = 1
    validation: int = 0
    image_size: int | None = None


STANDARD_RATE = 0.1  # of --schedule step, whatever the data set (REFERENCE.md's baseline)

RECIPES = {
    # The paper's: Huang et al. 2017, ResNet-110, the better of its two rates.
    "cifar10": Recipe("resnet110", epochs=200, learning_rate=0.2),
    "cifar100": Recipe("resnet110", epochs=200, learning_rate=0.2),
    "fashion-mnist": Recipe("resnet20", epochs=50, learning_rate=0.1),
    # The paper's, with the better of its two rates for ResNet-110 on each.
    "svhn": Recipe("resnet110", epochs=40, learning_rate=0.1, augment="none", validation=6000),
    "tiny-imagenet": Recipe("resnet110", epochs=150, learning_rate=0.2, cycles=6, stem_stride=2),
    # The authors' code's: ResNet-50, random resized crops, M = 2.
    "imagenet": Recipe(
        *("torchvision:resnet50", 90, 0.1), cycles=2, batch_size=256, augment="resized-crop", image_size=224
    ),
    "folder": Recipe("torchvision:resnet18", epochs=60, learning_rate=0.1, augment="resized-crop"),
    # Small enough for a first try: about a minute on two CPU cores.
    "digits": Recipe("resnet20", epochs=60, learning_rate=0.1),
}

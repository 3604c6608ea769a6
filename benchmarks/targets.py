"""What the project has set itself to reach on two CPU cores."""

import accuracy
import evaluation
import pictures
import pipelines
import ranks
import schedules
import serving
import throughput
from harness.measure import PROJECT
from harness.precisions import asked_of_all, by_default
from harness.verdicts import Target

# Never slower than by hand: images/s of ResNet-20 are at least so many times those of
FACTORS = {throughput.PLAIN: 1.7, throughput.CAREFUL: 1.15, throughput.TORCHENSEMBLE: 2.1}
RESNET110_FACTOR = 2.5


def targets_for(default: str) -> tuple[Target, ...]:
    """All targets on a processor whose default precision is `default`, "bf16" or "fp32".

    Those of training hold in every precision that makes sense on it: its default, and fp32 in any case.
    """
    precisions = dict.fromkeys((default, "fp32"))
    return (*(target for name in precisions for target in _resnet20(name)), _resnet110(default), *OTHERS)


def _resnet20(precision: str) -> tuple[Target, ...]:
    cases = tuple(throughput.case_of("resnet20", text(precision)) for text in (by_default, asked_of_all))
    return tuple(
        Target(
            f"training ResNet-20 in {precision}, times the images/s of: {opponent}",
            throughput.NAME,
            cases,
            opponent,
            "ratio",
            factor,
        )
        for opponent, factor in FACTORS.items()
    )


def _resnet110(precision: str) -> Target:
    return Target(
        f"training ResNet-110 in {precision}, times the images/s of: {throughput.PLAIN}",
        throughput.NAME,
        (throughput.case_of("resnet110", by_default(precision)),),
        throughput.PLAIN,
        "ratio",
        RESNET110_FACTOR,
    )


OTHERS = (
    *(
        Target(
            f"training {net} on two ranks, times the images/s of one process with two threads",
            ranks.NAME,
            (ranks.case_of(net),),
            ranks.TWO_THREADS,
            "ratio",
            0.95,
        )
        for net in ranks.NETS
    ),
    Target(
        "data pipeline, times a DataLoader's images/s with 2 workers",
        pipelines.NAME,
        (pipelines.CASE,),
        pipelines.DATALOADERS[2],
        "ratio",
        10,
    ),
    Target(
        "data pipeline, percent of a ResNet-20 step",
        pipelines.NAME,
        (pipelines.SHARE_CASE,),
        PROJECT,
        "median",
        3,
        at_most=True,
    ),
    *(
        Target(
            f"{where} of {name}, times the images/s of ImageFolder and DataLoader at its best",
            pictures.NAME,
            (case(name),),
            pictures.FOLDER_LOADER,
            "ratio",
            factor,
        )
        for name in ("photos", "tiny-imagenet-20")
        for where, case, factor in (
            ("streaming files", pictures.streaming_case, 2),
            ("from the cache, images", pictures.cached_case, 20),
        )
    ),
    Target(
        "evaluating 5 snapshots in fp32, share of the time of 10 plain forwards",
        evaluation.NAME,
        tuple(evaluation.case_of(text("fp32")) for text in (by_default, asked_of_all)),
        evaluation.TWICE,
        "share",
        0.35,
        at_most=True,
    ),
    *(
        Target(
            f"predicting with {members} x {net}, {batch} at a time, times as fast as: {serving.LOOP}",
            serving.NAME,
            (serving.case_of(net, members, batch),),
            serving.LOOP,
            "ratio",
            0.953 if batch == 1 else 1,
        )
        for net in serving.NETS
        for members in serving.MEMBERS
        for batch in serving.BATCHES
    ),
    Target(
        "first prediction of the command from a cold start, seconds",
        serving.NAME,
        (serving.COLD_CASE,),
        PROJECT,
        "median",
        6,
        at_most=True,
    ),
    Target(
        "import fastsnap on top of Python's start, seconds",
        serving.NAME,
        (serving.IMPORT_CASE,),
        PROJECT,
        "median",
        0.2,
        at_most=True,
    ),
    Target(
        "saving a snapshot, percent of an epoch",
        schedules.NAME,
        (schedules.SHARE_CASE,),
        PROJECT,
        "median",
        1,
        at_most=True,
    ),
    Target(
        "snapshot ensemble's error minus the standard schedule's, points, few images",
        accuracy.NAME,
        (accuracy.case_of(accuracy.FEW),),
        PROJECT,
        "difference",
        0,
        at_most=True,
    ),
)

"""All rules, in the order of docs/doctor.md."""

from normlab.diagnosis import network_rules as network
from normlab.diagnosis import reading_rules as reading
from normlab.diagnosis import statistics_rules as statistics
from normlab.diagnosis import training_rules as training

RULES = (
    reading.no_normalizer,
    reading.not_read,
    statistics.not_finite,
    statistics.variance_not_positive,
    statistics.never_updated,
    statistics.stale,
    statistics.updated_unequally,
    statistics.momentum_turned_round,
    statistics.constant_channel,
    statistics.eps_matters,
    statistics.gamma_vanished,
    network.useless_bias,
    network.dropout_before_normalizer,
    network.frozen_but_updating,
    network.learning_but_frozen,
    network.training_mode_exported,
    network.no_running_statistics,
    network.half_precision_statistics,
    training.small_batches,
    training.pretrained_by_batch,
    training.last_batch_of_one,
    training.accumulation,
    training.far_from_data,
    training.score_gap,
    training.class_never_right,
    training.no_better_than_simple,
)

"""Values on the command line that argparse takes for something else, or whose refusal does not help."""

import pytest

from evaluate_samples import Options as EvaluationOptions
from train_unconditional import Options
from trainkit.errors import UserError
from trainkit.options.parsing import parse_options


@pytest.mark.parametrize("value", ["-1e-4", "-1", "-.5", "-2E3"])
def test_a_negative_number_is_a_value(value):
    with pytest.raises(UserError, match=rf"--learning_rate .*{float(value):g}|--learning_rate {value}"):
        parse_options(Options, "", ["--learning_rate", value])


def test_a_misspelled_choice_is_corrected():
    with pytest.raises(UserError, match="argument --metrics: 'fidd' is none of .*: did you mean fid?"):
        parse_options(EvaluationOptions, "", ["--metrics", "fidd"])
    with pytest.raises(UserError, match="argument --lr_scheduler: 'cosin' is none of .*: did you mean cosine?"):
        parse_options(Options, "", ["--lr_scheduler", "cosin"])

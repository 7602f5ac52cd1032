"""Gradient tests of other modules again, with every backward in a fresh thread.

As autograd runs it for tensors of a GPU: without the context variables, autocast and grad mode of
the thread that called.
"""

import pytest
import test_active_set
import test_autograd_contract
import test_expected_embedding
import test_frozen_head
import test_linear_divergence
import test_propagation
import test_residual

pytestmark = pytest.mark.usefixtures("backward_in_thread")

# pytest collects them here too, with the fixtures that they take.
AGAIN = {
    test_autograd_contract: (
        "operation",
        "test_autocast",
        "test_backward_with_another_upstream_the_second_time",
        "test_changing_an_input_before_backward_is_noticed",
        "test_checkpointing",
        "test_double_backward_is_refused",
        "test_gradients_add_up_in_leaves",
        "test_offloaded_saved_tensors",
        "test_one_input_at_a_time",
        "test_outputs_used_by_different_losses",
        "test_saved_tensors_never_change",
        "test_what_is_kept_is_given_back",
    ),
    test_active_set: ("test_frozen_parts_and_loss", "test_second_backward_and_accumulation"),
    test_expected_embedding: ("test_gradients_only_of_what_needs_them", "test_tied_with_the_head"),
    test_frozen_head: ("test_a_second_call_before_the_first_backward", "test_one_upstream_alone"),
    test_linear_divergence: (
        "test_nothing_to_learn_and_nan",
        "test_second_derivatives_are_refused",
    ),
    test_propagation: (
        "test_cumsum_backward_twice_and_not_needed",
        "test_linear_and_adjoint_in_fp32",
    ),
    test_residual: ("test_backward_twice_and_not_needed", "test_gradients_of_every_order"),
}
for module, names in AGAIN.items():
    globals().update({name: getattr(module, name) for name in names})

"""Liger's fused linear losses by their names, constructors and calls, computed by fastpo, on CPUs too.

    from fastpo.integrations.liger import LigerFusedLinearDPOLoss

    loss, metrics = LigerFusedLinearDPOLoss(beta=0.1)(lm_head.weight, hidden, labels, None, ref_hidden, ref_weight)

The classes are those of `liger_kernel.chunked_loss` 0.8.5, the functions those of its `functional`, which take what
`LigerFusedLinear...Function.apply` takes; Liger itself is not needed. The numbers are Liger's, with its conventions:
pairs are stacked with the chosen ones first, targets are shifted by the caller, losses are averaged over the pairs, the
negative log-likelihood over all chosen tokens, and the second result holds Liger's metrics in its order, constants.

What differs:

- Nothing is compiled or cut into chunks of pairs: log-probs come from `fastpo.linear_logprobs`, in a buffer of a few
  megabytes. `compiled` and `chunk_size` are accepted, and say nothing here, but for the rows of logits that JSD holds.
- The weight's gradient is summed in fp32 and rounded once; Liger sums its chunks in the weight's dtype.
- Log-probs and losses are fp32 for bf16 and fp16 inputs, fp64 for fp64. On a GPU no logits are rounded to bf16.
- A batch without a valid token has loss 0, where Liger divides 0 by 0. ORPO's log(1 - p) is exact near p = 1.
- An option that Liger ignores raises: label_smoothing with other DPO losses than "exo_pair" and "robust", delta with
  "cispo", "sapo" and "vespo".
- "luspo" with a penalty, ratios or weights per token is a mean over sequences; Liger's is over padding too, and so
  depends on its width.
- The gradient is right for any upstream gradient, in a second backward, and, by the reference, of second order.

There is no cosine similarity loss.
"""

from fastpo.integrations.liger.distillation import LigerFusedLinearJSDLoss, liger_fused_linear_jsd
from fastpo.integrations.liger.pairs import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
    liger_fused_linear_cpo,
    liger_fused_linear_dpo,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
)
from fastpo.integrations.liger.policy import LigerFusedLinearGRPOLoss, liger_fused_linear_grpo
from fastpo.integrations.liger.unpaired import LigerFusedLinearKTOLoss, liger_fused_linear_kto

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
    "liger_fused_linear_jsd",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
]

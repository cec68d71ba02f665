"""What TRL's and Liger's GRPO have in common."""

# by `loss_type`, over what the loss of tokens is averaged
AGGREGATION_OF = {
    "grpo": "seq_mean_token_mean",
    "sapo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "dr_grpo": "const_norm",
    "luspo": "seq_mean_token_sum",
}

"""The meaning of every operation: one public function each, with a plain reference and its fast backends."""

from plait.ops.activation import gate as gate
from plait.ops.activation import squared_relu as squared_relu
from plait.ops.attention import attention as attention
from plait.ops.conv import causal_conv1d as causal_conv1d
from plait.ops.conv import causal_conv1d_step as causal_conv1d_step
from plait.ops.decode_attention import decode_attention as decode_attention
from plait.ops.dispatch import BackendError as BackendError
from plait.ops.dispatch import use as use
from plait.ops.loss import linear_cross_entropy as linear_cross_entropy
from plait.ops.moe import experts as experts
from plait.ops.moe import route as route
from plait.ops.norm import add_rms_norm as add_rms_norm
from plait.ops.norm import gated_rmsnorm as gated_rmsnorm
from plait.ops.norm import rms_norm as rms_norm
from plait.ops.rope import rotate as rotate
from plait.ops.sample import sample_ids as sample_ids
from plait.ops.ssd import selective_state_update as selective_state_update
from plait.ops.ssd import ssd as ssd

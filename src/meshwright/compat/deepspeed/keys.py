"""The keys of a DeepSpeed configuration: which are read, and why the others are left out.

From https://www.deepspeed.ai/docs/config-json/ and DeepSpeed 0.19's own readers.
"""

from __future__ import annotations

from typing import Final

__all__ = ["LEFT", "READ", "SECTIONS"]

_BUCKETS: Final = "buckets follow from the program; nothing needs to be tuned"
_OURS: Final = "runs write metrics.jsonl and TensorBoard events of their own"
_SCALE: Final = "reductions are means in float32, so that nothing overflows on the way"
_TRACE: Final = "`mw train --trace`, or a job's `trace=`, times every instruction"
_DISK: Final = "how files are read and written is Meshwright's (docs/offload.md)"
_PREFETCH: Final = "what is fetched ahead follows from the program"
_OTHER: Final = "changes what is trained, and has no counterpart"
_PURE: Final = "steps are equal to one device's under every plan"

# fmt: off
READ: Final = frozenset((
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "steps_per_print", "dataloader_drop_last", "optimizer.type",
    "optimizer.params", "scheduler.type", "scheduler.params", "bf16.enabled",
    "bfloat16.enabled", "fp16.enabled", "fp16.loss_scale", "fp16.initial_scale_power",
    "fp16.loss_scale_window", "torch_autocast.enabled", "torch_autocast.dtype",
    "zero_optimization.stage", "zero_optimization.mics_shard_size",
    "zero_optimization.cpu_offload", "zero_optimization.cpu_offload_params",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path", "activation_checkpointing.cpu_checkpointing",
    "tensor_parallel.autotp_size",
))
# fmt: on
"""Those that a plan or a job takes over."""

SECTIONS: Final = frozenset(
    {key.rpartition(".")[0] for key in READ if "." in key} | {"zero_optimization"}
)
"""Those keys that hold others which are read."""

LEFT: Final[dict[str, str]] = {
    "optimizer.legacy_fusion": "which kernels run is torch's choice",
    "fp16.auto_cast": "inputs are cast where the program needs it",
    "fp16.hysteresis": "an overflow lowers the scale at once, as torch.amp does",
    "fp16.consecutive_hysteresis": "an overflow lowers the scale at once, as torch.amp does",
    "fp16.min_loss_scale": "40 overflows in a row end the run instead",
    "fp16.fp16_master_weights_and_grads": "weights and sums stay float32",
    "bf16.immediate_grad_update": "gradients are summed in float32 as they come",
    "bf16.check_grad_overflow": "a loss that is not finite ends the run",
    "bf16.bf16_master_weights_and_grads": "weights and sums stay float32; precision=bf16-pure is "
    "the plan for bf16 state",
    "bf16.bf16_optimizer_states": "weights and sums stay float32; precision=bf16-pure is the plan "
    "for bf16 state",
    "torch_autocast.lower_precision_safe_modules": "which ops run in it is listed in "
    "docs/precision.md; a plan's [precisions] makes exceptions",
    "amp": "apex is not used; `bf16` or `fp16` asks for the same",
    "communication_data_type": _SCALE,
    "seq_parallel_communication_data_type": _SCALE,
    "prescale_gradients": _SCALE,
    "gradient_predivide_factor": _SCALE,
    "sparse_gradients": "gradients of embeddings are dense",
    "data_types": "gradients are summed in float32",
    "zero_allow_untested_optimizer": "every optimizer runs under every stage",
    "zero_force_ds_cpu_optimizer": "the script's own optimizer runs where its state rests",
    "graph_harvesting": "there is no CUDA graph",
    "wall_clock_breakdown": _TRACE,
    "memory_breakdown": "`mw report` shows it",
    "dump_state": "run.json holds it",
    "flops_profiler": _TRACE,
    "comms_logger": "`mw plan --explain` lists every collective",
    "tensorboard": _OURS,
    "wandb": _OURS,
    "csv_monitor": _OURS,
    "comet": _OURS,
    "monitor_config": _OURS,
    "aio": _DISK,
    "nebula": _DISK,
    "checkpoint": "checkpoints of any world size load under any other",
    "datastates_ckpt": _DISK,
    "load_universal_checkpoint": "`mw checkpoint convert` reads DeepSpeed's universal layout",
    "use_data_before_expert_parallel_": "the mesh's order is the plan's",
    "elasticity": "the global batch never depends on the world",
    "autotuning": "plans are priced by `mw plan`",
    "compile": "`compile=True` of a run compiles what was traced",
    "hybrid_engine": _OTHER,
    "sparse_attention": _OTHER,
    "compression_training": _OTHER,
    "curriculum_learning": _OTHER,
    "data_efficiency": _OTHER,
    "progressive_layer_drop": _OTHER,
    "eigenvalue": _OTHER,
    "quantize_training": _OTHER,
    "weight_quantization": _OTHER,
    "disable_allgather": _BUCKETS,
    "fp32_allreduce": _SCALE,
    "vocabulary_size": "nothing is padded",
    "pipeline": "a plan's pipeline= cuts any model",
    "timers": _TRACE,
    "tensor_parallel.tp": "tensor_parallel.autotp_size is read",
    "tensor_parallel.preset_model": "weights are split as the graph of the model says",
    "tensor_parallel.partition_config": "weights are split as the graph of the model says",
    "tensor_parallel.tp_overlap_comm": _BUCKETS,
    "tensor_parallel.dtype": "dtypes are those of the precision",
    "activation_checkpointing.partition_activations": "activations lie as the plan splits them",
    "activation_checkpointing.contiguous_memory_optimization": "memory is planned from the program",
    "activation_checkpointing.number_checkpoints": "the model's own regions count",
    "activation_checkpointing.synchronize_checkpoint_boundary": _TRACE,
    "activation_checkpointing.profile": _TRACE,
}
"""Why what is not read is left out, by key; a key stands for all below it."""

_ZERO: Final = {
    _BUCKETS: """allgather_partitions allgather_bucket_size reduce_bucket_size reduce_scatter
        overlap_comm contiguous_gradients use_multi_rank_bucket_allreduce round_robin_gradients
        legacy_stage1 use_all_reduce_for_fetch_params allgather_sequential""",
    _PREFETCH: """stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size
        stage3_param_persistence_threshold stage3_model_persistence_threshold sub_group_size
        prefetch_bucket_size param_persistence_threshold model_persistence_threshold
        max_live_parameters max_reuse_distance offload_param.pin_memory offload_optimizer.pin_memory
        offload_optimizer.pipeline_read offload_optimizer.pipeline_write offload_optimizer.pipeline
        offload_optimizer.fast_init cpu_offload_use_pin_memory""",
    _DISK: """offload_param.buffer_count offload_param.buffer_size offload_param.max_in_cpu
        offload_optimizer.buffer_count""",
    "all of a part rests in its tier": "offload_optimizer.ratio",
    "exports are whole (`save_16bit_model`)": """stage3_gather_fp16_weights_on_model_save
        gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save""",
    _PURE: """ignore_unused_parameters elastic_checkpoint load_from_fp32_weights
        log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory
        zeropp_loco_param pipeline_loading_checkpoint override_module_apply
        mics_hierarchical_params_gather module_granularity_threshold leaf_module""",
    "what travels is not compressed": """zero_quantized_weights zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_hpz_partition_size""",
    "offloaded state steps before the next forward": "super_offload cpuadam_cores_perc",
}

LEFT.update(
    {f"zero_optimization.{key}": why for why, keys in _ZERO.items() for key in keys.split()}
)

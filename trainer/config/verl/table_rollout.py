"""Rows about generation: the engine, sampling, turns, the way of the weights."""

from __future__ import annotations

from trainer.config.verl import decisions
from trainer.config.verl.rules import Kind, alias, decided, ignored, refused

_ROLLOUT = "actor_rollout_ref.rollout"
_VLLM = f"{_ROLLOUT}.engine_kwargs.vllm"
_DEAD = "verl does not use it either"
_SINGLE = "a response is one turn: there are no tools, no environments and no agent loops"
_ONE_TURN = "leave it out"
_OF_TURNS = "of several turns, which are not here"
_PLACED = "where replicas run, and how many, follows from device_mapping and tensor_model_parallel_size"
_CHANNEL = "the way of the weights follows from where roles run: CUDA IPC, shared memory, or Ray from node to node"
_WATCHED = "metrics of the rollout are in metrics.jsonl and the trackers"

ROLLOUT_KEYS = (
    *ignored("one engine serves synchronous and other sources", f"{_ROLLOUT}.mode"),
    refused(
        f"{_ROLLOUT}.nnodes",
        "nodes of the rollout's own are not counted apart",
        "set trainer.nnodes to all nodes, and the device_mapping of actor and rollout to their ranks",
    ),
    *ignored(_PLACED, f"{_ROLLOUT}.{{n_gpus_per_node,data_parallel_size,moe_tensor_parallel_size}}"),
    decided(
        f"{_ROLLOUT}.prompt_length",
        Kind.IGNORED,
        decisions.same_length,
        "data.max_prompt_length says it; another value is refused",
    ),
    decided(
        f"{_ROLLOUT}.response_length",
        Kind.IGNORED,
        decisions.same_length,
        "data.max_response_length says it; another value is refused",
    ),
    alias(f"{_ROLLOUT}.cudagraph_capture_sizes", f"{_VLLM}.compilation_config.cudagraph_capture_sizes"),
    decided(
        f"{_ROLLOUT}.expert_parallel_size",
        Kind.ALIAS,
        decisions.expert_parallel,
        "above 1: true, over the devices of a replica",
        f"{_VLLM}.enable_expert_parallel",
    ),
    refused(
        f"{_ROLLOUT}.pipeline_model_parallel_size",
        "replicas have no pipeline stages",
        f"set {_ROLLOUT}.tensor_model_parallel_size instead",
        1,
    ),
    refused(
        f"{_ROLLOUT}.logprobs_mode",
        "log-probs are those of the distribution that was sampled",
        "set it to processed_logprobs",
        "processed_logprobs",
    ),
    decided(
        f"{_ROLLOUT}.scheduling_policy",
        Kind.ALIAS,
        decisions.scheduling,
        "fcfs is vLLM's own choice",
        f"{_VLLM}.scheduling_policy",
    ),
    refused(
        f"{_ROLLOUT}.quantization",
        "updated weights are not quantised on their way to the replicas",
        "leave it null",
        "none",
        "null",
    ),
    *ignored("of quantised rollouts, which are not here", f"{_ROLLOUT}.quantization_config_file", f"{_ROLLOUT}.qat.**"),
    decided(
        f"{_ROLLOUT}.do_sample",
        Kind.IGNORED,
        decisions.train_sampling,
        "sampling follows temperature, top_p and top_k; false is refused",
    ),
    decided(
        f"{_ROLLOUT}.val_kwargs.do_sample",
        Kind.ALIAS,
        decisions.val_sampling,
        "false: 0; true: temperature decides",
        f"{_ROLLOUT}.val_kwargs.temperature",
    ),
    refused(f"{_ROLLOUT}.use_fire_sampling", "there is no such sampling", "leave it false"),
    *ignored(
        _WATCHED,
        f"{_ROLLOUT}.{{disable_log_stats,moe_load_balance_metrics_interval}}",
        f"{_ROLLOUT}.{{prometheus,trace}}.**",
    ),
    *ignored(
        _DEAD,
        f"{_ROLLOUT}.{{over_sample_rate,multi_stage_wake_up,skip_tokenizer_init}}",
        f"{_ROLLOUT}.agent.custom_async_server.**",
        f"{_ROLLOUT}.layer_name_map.**",
    ),
    *ignored("of another engine: generation is vLLM's", f"{_ROLLOUT}.engine_kwargs.{{sglang,trtllm}}.**"),
    refused(
        f"{_ROLLOUT}.enable_rollout_routing_replay",
        "routing replay is not here yet (docs/routing_replay.md)",
        "leave it false",
    ),
    # turns
    refused(
        f"{_ROLLOUT}.multi_turn.{{enable,tool_config_path,function_tool_path,interaction_config_path,"
        "completion_callback}",
        _SINGLE,
        _ONE_TURN,
    ),
    refused("data.{tool_config_path,function_tool_path}", _SINGLE, _ONE_TURN),
    refused(f"{_ROLLOUT}.agent.{{default_agent_loop,agent_loop_config_path}}", _SINGLE, _ONE_TURN, "single_turn_agent"),
    refused(
        f"{_ROLLOUT}.chat_scheduler",
        _SINGLE,
        _ONE_TURN,
        "examples.ppo_trainer.naive_chat_scheduler.NaiveChatCompletionScheduler",
    ),
    *ignored(
        _OF_TURNS,
        f"{_ROLLOUT}.multi_turn.{{max_assistant_turns,max_user_turns,max_turns,max_parallel_calls,"
        "max_tool_response_length,tool_response_truncate_side,use_inference_chat_template,"
        "tokenization_sanity_check_mode,format,num_repeat_rollouts}",
        "data.continuous_token.**",
    ),
    *ignored("requests are spread over the replicas by the driver", f"{_ROLLOUT}.agent.num_workers"),
    # where replicas are, and how weights get there
    *ignored(
        _CHANNEL,
        f"{_ROLLOUT}.checkpoint_engine.{{backend,custom_backend_module}}",
        f"{_ROLLOUT}.checkpoint_engine.engine_kwargs.**",
    ),
    refused(f"{_ROLLOUT}.disaggregation.enabled", "prefill and decoding run in one engine", "leave it false"),
    *ignored(
        "of engines with prefill and decoding apart, which are not here",
        f"{_ROLLOUT}.disaggregation.{{prefill_replicas,decode_replicas,decode_tensor_model_parallel_size,"
        "transfer_backend,bootstrap_port,ib_device}",
    ),
    refused(
        f"{{{_ROLLOUT}.skip_rollout,{_ROLLOUT}.skip.enable,skip.rollout.enable,skip.rollout_tq.enable,"
        "skip.async_rollout.enable}",
        "responses are generated in every run",
        "leave it false",
    ),
    *ignored(
        "of runs that read responses from a file, which are not here",
        f"{{{_ROLLOUT}.skip,skip.rollout,skip.rollout_tq,skip.async_rollout}}.{{dump_dir,steps,action,max_dump_step}}",
        f"{_ROLLOUT}.skip_dump_dir",
    ),
)

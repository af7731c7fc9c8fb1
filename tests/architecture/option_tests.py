"""For every option of a run the test that fails when the option has no effect, below `tests/`."""

_SUBJECT = "tasks/subject/test_options.py::"
_SELECTION = "tasks/subject/test_selection.py::"
_PHOTO = f"{_SUBJECT}test_a_photo_outside_a_configured_bound_is_rejected"
_INGEST = "tasks/subject/photos/test_ingest.py::"
_WEB = f"{_SUBJECT}test_web_lookup_uses_the_configured_query_and_domains"
_APPROVAL = "flows/runs/test_approval.py::test_the_policy_decides_after_the_configured_hours"
_RUN = "flows/test_options.py::"
_GATE = "tasks/publishing/test_gate.py::"
_PRIOR = "tasks/prior/test_options.py::"
_EFFECTS = "tasks/training/test_option_effects.py::"
_LEARNED = f"{_EFFECTS}test_an_option_changes_the_trained_weights"
_PROCESS = f"{_EFFECTS}test_num_threads_and_deterministic_are_applied_to_the_process"
_METHODS = "tasks/training/test_methods.py::"
_TRAINING = "tasks/training/test_options.py::"
_VALIDATION = "tasks/training/callbacks/test_validation.py::"
_RANKS = "tasks/training/process/test_ranks.py::"
_WORKER = "tasks/training/process/test_worker.py::"
_EVALUATION = "tasks/evaluation/test_options.py::"
_ENCODER_OPTIONS = "tasks/encoders/test_options.py::"
_ENCODERS = "tasks/encoders/test_embeddings.py::"
_JUDGE = "tasks/scoring/test_judge.py::"
_SHOWN = "tasks/scoring/test_options.py::"
_DIFFUSION = "tasks/diffusion/test_options.py::"
_SERVICES = "tasks/services/test_options.py::"
_ROLE = f"{_SERVICES}test_a_role_uses_its_own_profile"
_CLIENT = f"{_SERVICES}test_the_s3_client_uses_the_configured_region_and_checksums"
_BUCKET = f"{_SERVICES}test_keys_in_a_bucket_begin_with_the_configured_prefix"
_DATABASE = f"{_SERVICES}test_runs_are_tracked_in_the_configured_database_and_experiment"
_TRACKING = "tasks/services/tracking/"
_KILLED = "faults/test_killed.py::"

OPTION_TESTS = {
    "output_dir": f"{_RUN}test_a_run_writes_into_the_configured_folder",
    "seed": f"{_RUN}test_the_seed_changes_the_training_key",
    "subject.source": f"{_INGEST}test_good_photos_are_accepted",
    "subject.class_noun": "tasks/subject/photos/test_known_world.py::"
    "test_a_class_noun_outside_the_synthetic_world_is_rejected",
    "subject.identifier_token": f"{_RUN}test_prompts_contain_the_configured_token_and_class_prompt",
    "subject.captioning": f"{_SELECTION}test_user_captions_with_the_template_send_no_llm_request",
    "subject.captions": f"{_SELECTION}test_user_captions_with_the_template_send_no_llm_request",
    "subject.batch_threshold": f"{_SELECTION}test_captions_above_batch_threshold_use_one_batch_job",
    "subject.max_wait_seconds": f"{_SUBJECT}test_a_caption_batch_job_past_max_wait_seconds_suspends_the_run",
    "subject.is_profiled": f"{_SELECTION}test_the_subject_profile_request_contains_as_many_photos_as_fit",
    "subject.web_lookup.enabled": "tasks/services/llm/agents/test_web_search.py::"
    "test_names_are_looked_up_once_by_the_responses_api_and_sources_recorded",
    "subject.web_lookup.query": _WEB,
    "subject.web_lookup.domains": _WEB,
    "subject.max_leak_fraction": f"{_SELECTION}test_trait_leaks_are_removed_and_counted_and_too_many_stop_the_run",
    "subject.allow_unknown": "tasks/subject/photos/test_known_world.py::"
    "test_real_photos_are_rejected_with_three_alternatives_and_the_verdict_cached",
    "subject.min_images": f"{_SUBJECT}test_fewer_photos_than_min_images_are_rejected",
    "subject.max_images": f"{_INGEST}test_too_many_photos_are_refused_before_any_is_read",
    "subject.max_trained": f"{_SELECTION}test_max_trained_selects_the_top_photos",
    "subject.excluded_photos": _PHOTO,
    "subject.approval": "flows/test_approval.py::test_a_run_waits_for_approval_and_goes_on_after_it",
    "subject.approval_hours": _APPROVAL,
    "subject.approval_on_timeout": _APPROVAL,
    "subject.min_side": _PHOTO,
    "subject.max_aspect": _PHOTO,
    "subject.max_pixels": _PHOTO,
    "subject.working_side": f"{_INGEST}test_photos_are_downscaled_to_working_side_on_the_short_side",
    "subject.min_sharpness": _PHOTO,
    "subject.min_brightness": _PHOTO,
    "subject.max_brightness": _PHOTO,
    "subject.min_contrast": _PHOTO,
    "subject.duplicate_distance": f"{_SUBJECT}test_photos_within_duplicate_distance_are_duplicates",
    "prior.num_class_images": f"{_PRIOR}test_num_class_images_batch_size_and_seed_determine_the_class_images",
    "prior.class_prompt": f"{_RUN}test_prompts_contain_the_configured_token_and_class_prompt",
    "prior.num_inference_steps": f"{_PRIOR}test_num_inference_steps_and_guidance_scale_change_the_images",
    "prior.guidance_scale": f"{_PRIOR}test_num_inference_steps_and_guidance_scale_change_the_images",
    "prior.seed": f"{_PRIOR}test_num_class_images_batch_size_and_seed_determine_the_class_images",
    "prior.batch_size": f"{_PRIOR}test_num_class_images_batch_size_and_seed_determine_the_class_images",
    "prior.num_devices": f"{_PRIOR}test_num_devices_selects_multi_device_generation",
    "training.method": f"{_METHODS}test_every_method_changes_the_images_and_writes_its_files",
    "training.lora.learning_rate": _LEARNED,
    "training.lora.text_encoder_learning_rate": _LEARNED,
    "training.lora.rank": _LEARNED,
    "training.lora.lora_alpha": _LEARNED,
    "training.lora.lora_dropout": _LEARNED,
    "training.lora.use_dora": f"{_METHODS}test_a_lora_adapter_samples_the_same_image_in_diffusers",
    "training.lora.target_modules": _LEARNED,
    "training.lora.save_precision": f"{_EFFECTS}test_an_adapter_is_saved_in_the_configured_precision",
    "training.textual_inversion.num_vectors": _LEARNED,
    "training.textual_inversion.learning_rate": _LEARNED,
    "training.textual_inversion.initializer_token": _LEARNED,
    "training.textual_inversion.switch_step": f"{_METHODS}test_before_switch_step_only_the_placeholder_token_is_trained",
    "training.validation.validation_steps": f"{_VALIDATION}test_the_same_weights_have_the_same_validation_loss",
    "training.validation.keep": f"{_VALIDATION}test_the_best_weights_are_published",
    "training.validation.metric": f"{_VALIDATION}test_validation_similarity_is_measured_on_samples_of_the_current_weights",
    "training.validation.num_holdout": f"{_VALIDATION}test_num_holdout_is_respected_and_holding_out_all_photos_is_rejected",
    "training.validation.save_top_k": f"{_VALIDATION}test_save_top_k_checkpoints_are_retained_in_the_published_format",
    "training.validation.early_stopping": f"{_VALIDATION}test_early_stopping_ends_training_when_the_loss_has_converged",
    "training.validation.window": f"{_VALIDATION}test_convergence_requires_low_variance_within_the_window",
    "training.validation.threshold": f"{_VALIDATION}test_convergence_depends_on_the_threshold",
    "training.validation.sample_steps": f"{_EFFECTS}test_sample_steps_prompts_and_inference_steps_are_respected",
    "training.validation.sample_prompts": f"{_EFFECTS}test_sample_steps_prompts_and_inference_steps_are_respected",
    "training.validation.sample_num_inference_steps": f"{_EFFECTS}test_sample_steps_prompts_and_inference_steps_are_respected",
    "training.train_denoiser": _LEARNED,
    "training.max_train_steps": _LEARNED,
    "training.train_batch_size": _LEARNED,
    "training.gradient_accumulation_steps": _LEARNED,
    "training.learning_rate": _LEARNED,
    "training.text_encoder_learning_rate": _LEARNED,
    "training.train_text_encoder": _LEARNED,
    "training.optimizer": _LEARNED,
    "training.lr_scheduler": f"{_EFFECTS}test_lr_scheduler_options_determine_the_learning_rate_factors",
    "training.lr_warmup_steps": f"{_EFFECTS}test_lr_scheduler_options_determine_the_learning_rate_factors",
    "training.lr_num_cycles": f"{_EFFECTS}test_lr_scheduler_options_determine_the_learning_rate_factors",
    "training.lr_power": f"{_EFFECTS}test_lr_scheduler_options_determine_the_learning_rate_factors",
    "training.weight_decay": _LEARNED,
    "training.max_grad_norm": _LEARNED,
    "training.prior_loss_weight": _LEARNED,
    "training.snr_gamma": _LEARNED,
    "training.proportion_empty_prompts": f"{_TRAINING}test_proportion_empty_prompts_changes_the_loss",
    "training.ema_decay": f"{_TRAINING}test_ema_weights_are_published_and_training_is_unchanged",
    "training.gradient_checkpointing": f"{_EFFECTS}test_gradient_checkpointing_is_set_on_denoiser_and_text_encoders",
    "training.num_crop_variants": "tasks/training/test_known_defects.py::"
    "test_d7_flips_and_crops_are_resampled_at_every_step",
    "training.aspect_ratio_bucketing": "tasks/training/data/test_buckets.py::test_photos_of_all_aspect_ratios_are_trained",
    "training.background_loss_weight": f"{_EFFECTS}test_background_loss_weight_changes_the_trained_weights_of_masked_photos",
    "training.flip_probability": _LEARNED,
    "training.mixed_precision": _LEARNED,
    "training.weight_dtype": f"{_METHODS}test_weight_dtype_applies_to_frozen_weights_and_not_to_trained_ones",
    "training.allow_tf32": f"{_EFFECTS}test_allow_tf32_sets_the_flags_of_matmul_and_cudnn",
    "training.channels_last": f"{_EFFECTS}test_channels_last_sets_the_memory_format_of_convolutions",
    "training.compile": f"{_EFFECTS}test_compile_option_compiles_the_denoiser_blocks",
    "training.deterministic": _PROCESS,
    "training.max_skipped_steps": f"{_WORKER}test_too_many_non_finite_steps_stop_training_and_name_their_samples",
    "training.checkpointing_steps": f"{_EFFECTS}test_checkpointing_steps_and_checkpoints_total_limit_are_respected",
    "training.checkpoints_total_limit": f"{_EFFECTS}test_checkpointing_steps_and_checkpoints_total_limit_are_respected",
    "training.upload_checkpoints": "tasks/training/process/test_remote_checkpoints.py::"
    "test_checkpoints_are_uploaded_in_the_background_unless_disabled",
    "training.log_every_n_steps": f"{_EFFECTS}test_log_every_n_steps_sets_the_logging_interval",
    "training.num_devices": f"{_RANKS}test_a_stalled_rank_terminates_all_ranks",
    "training.fsdp": f"{_RANKS}test_fsdp_training_matches_data_parallel_and_resumes_bit_identically",
    "training.num_nodes": f"{_RANKS}test_two_nodes_train_bit_identically_to_two_ranks_of_one_node",
    "training.rdzv_endpoint": f"{_RANKS}test_two_nodes_train_bit_identically_to_two_ranks_of_one_node",
    "training.num_threads": _PROCESS,
    "training.stall_seconds": f"{_RANKS}test_a_stalled_rank_terminates_all_ranks",
    "training.grace_seconds": f"{_EFFECTS}test_a_worker_is_killed_after_grace_seconds_even_before_it_saves",
    "evaluation.prompts": f"{_EVALUATION}test_the_sampling_plan_follows_the_configured_prompts_counts_and_seed",
    "evaluation.num_images_per_prompt": f"{_EVALUATION}test_the_sampling_plan_follows_the_configured_prompts_counts_and_seed",
    "evaluation.num_class_images": f"{_EVALUATION}test_the_sampling_plan_follows_the_configured_prompts_counts_and_seed",
    "evaluation.num_candidate_images": "tasks/evaluation/test_sampling.py::"
    "test_candidates_sample_every_prompt_once_before_repeating_any",
    "evaluation.num_inference_steps": f"{_EVALUATION}test_the_sampling_options_change_the_samples",
    "evaluation.guidance_scale": f"{_EVALUATION}test_the_sampling_options_change_the_samples",
    "evaluation.subject_kind": "tasks/evaluation/test_prompt_sets.py::test_subject_kind_overrides_what_the_class_noun_says",
    "evaluation.negative_prompt": f"{_EVALUATION}test_the_sampling_options_change_the_samples",
    "evaluation.guidance_rescale": f"{_EVALUATION}test_the_sampling_options_change_the_samples",
    "evaluation.lora_scale": "tasks/diffusion/lora/test_adapters.py::test_lora_scale_scales_the_adapters_effect",
    "evaluation.seed": f"{_EVALUATION}test_the_sampling_plan_follows_the_configured_prompts_counts_and_seed",
    "evaluation.batch_size": f"{_EVALUATION}test_samples_are_generated_in_batches_of_batch_size",
    "evaluation.num_devices": f"{_EVALUATION}test_num_devices_selects_sampling_on_several_devices",
    "evaluation.encoders.clip": f"{_ENCODERS}test_a_missing_encoder_raises_an_error_with_the_setting_to_change",
    "evaluation.safety_checker": "tasks/evaluation/test_safety.py::"
    "test_refused_samples_are_dropped_and_counted_unless_the_checker_is_off",
    "evaluation.encoders.clip_revision": f"{_ENCODER_OPTIONS}test_encoders_are_loaded_at_their_pinned_revisions",
    "evaluation.encoders.dino": f"{_ENCODERS}test_a_missing_encoder_raises_an_error_with_the_setting_to_change",
    "evaluation.encoders.dino_revision": f"{_ENCODER_OPTIONS}test_encoders_are_loaded_at_their_pinned_revisions",
    "evaluation.encoders.dino_resize": f"{_ENCODER_OPTIONS}test_dino_resize_changes_the_dino_embeddings",
    "evaluation.encoders.lpips": f"{_ENCODERS}test_missing_lpips_weights_skip_the_metric_or_raise_if_configured",
    "scoring.executor": f"{_SHOWN}test_judge_requests_use_the_configured_executor",
    "scoring.num_reference_images": f"{_SHOWN}test_num_reference_images_sets_the_references_per_judge_request",
    "scoring.max_side": f"{_SHOWN}test_max_side_bounds_the_images_of_judge_requests",
    "scoring.num_repeats": f"{_SHOWN}test_judge_request_counts_follow_the_configured_repeats_controls_and_pairs",
    "scoring.num_repeated": f"{_SHOWN}test_judge_request_counts_follow_the_configured_repeats_controls_and_pairs",
    "scoring.num_controls": f"{_SHOWN}test_judge_request_counts_follow_the_configured_repeats_controls_and_pairs",
    "scoring.num_pairs": f"{_SHOWN}test_judge_request_counts_follow_the_configured_repeats_controls_and_pairs",
    "scoring.num_checkpoint_pairs": f"{_JUDGE}test_retained_checkpoints_are_compared_pairwise_in_both_orders_and_ranked",
    "scoring.disagreement_threshold": f"{_JUDGE}test_disagreement_with_the_second_judge_requires_a_tie_break",
    "scoring.second_judge_fraction": f"{_JUDGE}test_agreement_is_computed_with_the_second_judge_and_human_labels",
    "scoring.labels": f"{_SHOWN}test_human_labels_are_read_from_the_configured_file",
    "scoring.poll_seconds": f"{_SHOWN}test_poll_seconds_and_max_wait_seconds_apply_to_a_batch_job",
    "scoring.max_wait_seconds": f"{_SHOWN}test_poll_seconds_and_max_wait_seconds_apply_to_a_batch_job",
    "scoring.deadline_seconds": f"{_SHOWN}test_a_batch_job_past_deadline_seconds_is_cancelled",
    "scoring.max_failed_fraction": f"{_SHOWN}test_the_configured_fraction_of_judge_requests_may_fail",
    "publishing.pick": "tasks/publishing/test_pick.py::test_each_value_of_pick_publishes_other_weights",
    "publishing.is_registered": f"{_RUN}test_no_model_is_registered_if_is_registered_is_false",
    "publishing.is_promoted": f"{_RUN}test_the_gate_is_asked_unless_is_promoted_is_false",
    "publishing.gate.min_dino_gain": f"{_GATE}test_each_limit_is_that_of_the_configuration",
    "publishing.gate.max_clip_t_loss": f"{_GATE}test_each_limit_is_that_of_the_configuration",
    "publishing.gate.max_pres_gain": f"{_GATE}test_each_limit_is_that_of_the_configuration",
    "publishing.gate.max_copies": f"{_GATE}test_each_limit_is_that_of_the_configuration",
    "publishing.gate.needs_reliable_judge": f"{_GATE}test_each_limit_is_that_of_the_configuration",
    "publishing.title": f"{_RUN}test_the_report_has_the_configured_title",
    "diffusion.family": f"{_DIFFUSION}test_a_model_of_another_family_is_rejected",
    "diffusion.pretrained_model_name_or_path": f"{_DIFFUSION}test_the_configured_model_is_loaded",
    "diffusion.revision": f"{_DIFFUSION}test_a_repository_is_loaded_at_its_pinned_revision",
    "diffusion.resolution": f"{_DIFFUSION}test_images_have_the_configured_resolution",
    "diffusion.sampler": f"{_DIFFUSION}test_sampler_and_precision_change_the_image",
    "diffusion.precision": f"{_DIFFUSION}test_sampler_and_precision_change_the_image",
    "diffusion.device": f"{_DIFFUSION}test_an_unavailable_device_is_rejected",
    "llm.models": f"{_SERVICES}test_roles_without_their_own_profile_use_the_default_fallback_chain",
    "llm.inspector": _ROLE,
    "llm.captioner": _ROLE,
    "llm.profiler": _ROLE,
    "llm.adjudicator": _ROLE,
    "llm.judge": _ROLE,
    "llm.second_judge": _ROLE,
    "llm.reviewer": _ROLE,
    "llm.budget_usd": "tasks/services/llm/test_fallback_chain.py::"
    "test_eight_workers_with_budget_for_three_requests_send_three",
    "llm.max_repair_fraction": "tasks/services/llm/test_retries.py::"
    "test_max_repair_fraction_bounds_the_repairs_across_all_requests",
    "llm.profiles": _ROLE,
    "store.kind": f"{_BUCKET}",
    "store.folder": f"{_SERVICES}test_objects_are_stored_in_the_configured_folder",
    "store.bucket": "tasks/services/test_store.py::test_a_missing_bucket_is_named_in_the_error",
    "store.prefix": _BUCKET,
    "store.endpoint_url": _BUCKET,
    "store.region": _CLIENT,
    "store.request_checksums": _CLIENT,
    "store.addressing_style": f"{_SERVICES}test_the_bucket_is_named_in_the_path_or_in_the_host",
    "store.max_attempts": "tasks/services/test_store_faults.py::test_a_request_is_tried_as_often_as_configured",
    "store.max_upload_rate": f"{_SERVICES}test_uploads_of_files_are_bounded_to_the_configured_rate",
    "tracking.kind": f"{_SERVICES}test_tracking_kind_selects_the_tracker",
    "tracking.loggers": "tasks/services/tracking/test_loggers.py::test_additional_trackers_receive_the_same_run",
    "tracking.wandb_mode": "tasks/services/tracking/test_loggers.py::test_wandb_needs_a_key_only_online",
    "tracking.uri": _DATABASE,
    "tracking.experiment": _DATABASE,
    "tracking.system_metrics_interval": f"{_TRACKING}test_mlflow_tracker.py::test_system_metrics_are_sampled_while_live",
    "tracking.llm_traces": f"{_TRACKING}test_llm_traces.py::test_llm_calls_are_traced_without_text_images_or_keys",
    "tracking.max_wait_seconds": f"{_TRACKING}test_outage.py::"
    "test_a_publication_waits_as_long_as_configured_for_a_server",
    "tracking.registered_model": f"{_RUN}test_the_model_is_registered_under_the_configured_name",
}

"""For every option of a run the test that fails when the option has no effect, below `tests/`."""

_SUBJECT = "tasks/subject/test_options.py::"
_SELECTION = "tasks/subject/test_selection.py::"
_PHOTO = f"{_SUBJECT}test_a_bound_on_photos_is_held"
_INGEST = "tasks/subject/photos/test_ingest.py::"
_WEB = f"{_SUBJECT}test_the_web_is_asked_for_the_configured_name_on_the_configured_sites"
_RUN = "flows/test_options.py::"
_PRIOR = "tasks/prior/test_options.py::"
_EFFECTS = "tasks/training/test_option_effects.py::"
_LEARNED = f"{_EFFECTS}test_an_option_changes_what_is_learned"
_PROCESS = f"{_EFFECTS}test_a_process_has_the_threads_and_kernels_that_are_configured"
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
_ROLE = f"{_SERVICES}test_a_role_is_served_by_its_own_profile"
_CLIENT = f"{_SERVICES}test_the_client_of_a_bucket_is_configured"
_BUCKET = f"{_SERVICES}test_keys_in_a_bucket_begin_with_the_configured_prefix"
_DATABASE = f"{_SERVICES}test_runs_are_tracked_in_the_configured_database_and_experiment"
_KILLED = "faults/test_killed.py::"

OPTION_TESTS = {
    "output_dir": f"{_RUN}test_a_run_writes_into_the_configured_folder",
    "seed": f"{_RUN}test_the_seed_makes_another_model",
    "subject.source": f"{_INGEST}test_good_photos_are_accepted",
    "subject.class_noun": "tasks/subject/photos/test_known_world.py::"
    "test_a_class_noun_of_the_real_world_is_refused_by_name",
    "subject.identifier_token": f"{_RUN}test_prompts_hold_the_configured_token_and_class",
    "subject.captioning": f"{_SELECTION}test_a_persons_captions_need_no_model",
    "subject.captions": f"{_SELECTION}test_a_persons_captions_need_no_model",
    "subject.batch_threshold": f"{_SELECTION}test_many_captions_go_by_one_batch_job",
    "subject.max_wait_seconds": f"{_SUBJECT}test_a_batch_job_of_captions_is_waited_for_as_long_as_configured",
    "subject.is_profiled": f"{_SELECTION}test_all_photos_are_looked_at_in_one_request_as_many_as_fit",
    "subject.web_lookup.enabled": "tasks/services/llm/agents/test_web_search.py::"
    "test_names_are_looked_up_by_responses_once_and_the_pages_kept",
    "subject.web_lookup.query": _WEB,
    "subject.web_lookup.domains": _WEB,
    "subject.max_leak_share": f"{_SELECTION}test_leaks_are_cut_counted_and_too_many_of_them_stop_the_run",
    "subject.allow_unknown": "tasks/subject/photos/test_known_world.py::"
    "test_a_cat_is_refused_with_three_ways_on_and_known_afterwards",
    "subject.min_images": f"{_SUBJECT}test_fewer_photos_than_configured_are_refused",
    "subject.max_images": f"{_INGEST}test_too_many_photos_are_refused_before_any_is_read",
    "subject.max_trained": f"{_SELECTION}test_of_many_photos_the_best_are_trained_on",
    "subject.min_side": _PHOTO,
    "subject.max_aspect": _PHOTO,
    "subject.max_pixels": _PHOTO,
    "subject.working_side": f"{_INGEST}test_photos_are_kept_with_the_working_side_on_their_short_side",
    "subject.min_sharpness": _PHOTO,
    "subject.min_brightness": _PHOTO,
    "subject.max_brightness": _PHOTO,
    "subject.min_contrast": _PHOTO,
    "subject.duplicate_distance": f"{_SUBJECT}test_photos_closer_than_the_configured_distance_are_one",
    "prior.num_class_images": f"{_PRIOR}test_as_many_class_images_are_drawn_as_configured",
    "prior.class_prompt": f"{_RUN}test_prompts_hold_the_configured_token_and_class",
    "prior.num_inference_steps": f"{_PRIOR}test_pictures_are_sampled_as_configured",
    "prior.guidance_scale": f"{_PRIOR}test_pictures_are_sampled_as_configured",
    "prior.seed": f"{_PRIOR}test_as_many_class_images_are_drawn_as_configured",
    "prior.batch_size": f"{_PRIOR}test_as_many_class_images_are_drawn_as_configured",
    "prior.num_devices": f"{_PRIOR}test_several_devices_draw_where_it_is_configured",
    "training.method": f"{_METHODS}test_every_method_changes_the_pictures_and_writes_its_files",
    "training.lora.learning_rate": _LEARNED,
    "training.lora.text_encoder_learning_rate": _LEARNED,
    "training.lora.rank": _LEARNED,
    "training.lora.lora_alpha": _LEARNED,
    "training.lora.lora_dropout": _LEARNED,
    "training.lora.use_dora": f"{_METHODS}test_adapters_load_in_diffusers_as_here",
    "training.lora.target_modules": _LEARNED,
    "training.lora.save_precision": f"{_EFFECTS}test_an_adapter_is_saved_in_the_configured_format",
    "training.textual_inversion.num_vectors": _LEARNED,
    "training.textual_inversion.learning_rate": _LEARNED,
    "training.textual_inversion.initializer_token": _LEARNED,
    "training.textual_inversion.switch_step": f"{_METHODS}test_until_the_switch_the_token_alone_is_trained",
    "training.validation.validation_steps": f"{_VALIDATION}test_the_same_weights_have_the_same_validation_loss",
    "training.validation.keep": f"{_VALIDATION}test_the_best_weights_are_published",
    "training.validation.metric": f"{_VALIDATION}test_similarity_is_that_of_samples_drawn_of_the_weights",
    "training.validation.num_holdout": f"{_VALIDATION}test_what_is_asked_for_is_held_out_and_all_photos_cannot_be",
    "training.validation.save_top_k": f"{_VALIDATION}test_the_best_few_are_kept_and_written_as_the_published_one_is",
    "training.validation.early_stopping": f"{_VALIDATION}test_training_stops_where_the_loss_has_settled",
    "training.validation.window": f"{_VALIDATION}test_settled_means_little_variance_of_late",
    "training.validation.threshold": f"{_VALIDATION}test_settled_is_what_lies_below_the_threshold",
    "training.validation.sample_steps": f"{_EFFECTS}test_samples_are_drawn_as_configured",
    "training.validation.sample_prompts": f"{_EFFECTS}test_samples_are_drawn_as_configured",
    "training.validation.sample_num_inference_steps": f"{_EFFECTS}test_samples_are_drawn_as_configured",
    "training.train_denoiser": _LEARNED,
    "training.max_train_steps": _LEARNED,
    "training.train_batch_size": _LEARNED,
    "training.gradient_accumulation_steps": _LEARNED,
    "training.learning_rate": _LEARNED,
    "training.text_encoder_learning_rate": _LEARNED,
    "training.train_text_encoder": _LEARNED,
    "training.optimizer": _LEARNED,
    "training.lr_scheduler": f"{_EFFECTS}test_a_schedule_is_that_of_its_settings",
    "training.lr_warmup_steps": f"{_EFFECTS}test_a_schedule_is_that_of_its_settings",
    "training.lr_num_cycles": f"{_EFFECTS}test_a_schedule_is_that_of_its_settings",
    "training.lr_power": f"{_EFFECTS}test_a_schedule_is_that_of_its_settings",
    "training.weight_decay": _LEARNED,
    "training.max_grad_norm": _LEARNED,
    "training.prior_loss_weight": _LEARNED,
    "training.snr_gamma": _LEARNED,
    "training.proportion_empty_prompts": f"{_TRAINING}test_dropped_captions_change_the_loss",
    "training.ema_decay": f"{_TRAINING}test_averages_are_published_and_training_stays_as_it_is",
    "training.gradient_checkpointing": f"{_EFFECTS}test_activations_are_recomputed_where_it_is_configured",
    "training.num_crop_variants": "tasks/training/test_known_defects.py::"
    "test_d7_mirroring_and_crops_are_drawn_anew_at_every_step",
    "training.aspect_ratio_bucketing": "tasks/training/data/test_buckets.py::test_photos_of_all_shapes_are_trained",
    "training.background_loss_weight": f"{_EFFECTS}test_the_background_of_a_cut_out_photo_weighs_as_configured",
    "training.flip_probability": _LEARNED,
    "training.mixed_precision": _LEARNED,
    "training.weight_dtype": f"{_METHODS}test_frozen_weights_may_be_half_precision_and_what_is_trained_is_not",
    "training.allow_tf32": f"{_EFFECTS}test_tf32_is_on_where_it_is_configured",
    "training.channels_last": f"{_EFFECTS}test_convolutions_are_laid_out_as_configured",
    "training.compile": f"{_EFFECTS}test_blocks_are_compiled_where_it_is_configured",
    "training.deterministic": _PROCESS,
    "training.max_skipped_steps": f"{_WORKER}test_too_many_steps_that_are_not_finite_stop_training_with_their_samples",
    "training.checkpointing_steps": f"{_EFFECTS}test_checkpoints_are_written_and_kept_as_often_as_configured",
    "training.checkpoints_total_limit": f"{_EFFECTS}test_checkpoints_are_written_and_kept_as_often_as_configured",
    "training.log_every_n_steps": f"{_EFFECTS}test_progress_is_logged_as_often_as_configured",
    "training.num_devices": f"{_RANKS}test_no_rank_outlives_one_that_stands_still",
    "training.fsdp": f"{_RANKS}test_sharded_ranks_do_the_same_and_resume_bit_equal",
    "training.num_nodes": f"{_RANKS}test_two_machines_do_what_two_ranks_of_one_do",
    "training.rdzv_endpoint": f"{_RANKS}test_two_machines_do_what_two_ranks_of_one_do",
    "training.num_threads": _PROCESS,
    "training.stall_seconds": f"{_RANKS}test_no_rank_outlives_one_that_stands_still",
    "training.grace_seconds": f"{_EFFECTS}test_a_worker_without_grace_is_ended_before_it_saves",
    "evaluation.prompts": f"{_EVALUATION}test_samples_are_planned_as_configured",
    "evaluation.num_images_per_prompt": f"{_EVALUATION}test_samples_are_planned_as_configured",
    "evaluation.num_class_images": f"{_EVALUATION}test_samples_are_planned_as_configured",
    "evaluation.num_candidate_images": "tasks/evaluation/test_sampling.py::"
    "test_other_kept_weights_draw_each_prompt_once_before_any_twice",
    "evaluation.num_inference_steps": f"{_EVALUATION}test_samples_are_drawn_as_configured",
    "evaluation.guidance_scale": f"{_EVALUATION}test_samples_are_drawn_as_configured",
    "evaluation.seed": f"{_EVALUATION}test_samples_are_planned_as_configured",
    "evaluation.batch_size": f"{_EVALUATION}test_batches_are_as_large_as_configured",
    "evaluation.encoders.clip": f"{_ENCODERS}test_a_missing_encoder_is_named_with_the_way_out",
    "evaluation.encoders.clip_revision": f"{_ENCODER_OPTIONS}test_encoders_are_taken_at_their_pinned_commits",
    "evaluation.encoders.dino": f"{_ENCODERS}test_a_missing_encoder_is_named_with_the_way_out",
    "evaluation.encoders.dino_revision": f"{_ENCODER_OPTIONS}test_encoders_are_taken_at_their_pinned_commits",
    "evaluation.encoders.dino_resize": f"{_ENCODER_OPTIONS}test_pictures_are_resized_for_dino_as_configured",
    "evaluation.encoders.lpips": f"{_ENCODERS}test_lpips_is_left_out_or_named_where_its_weights_are_missing",
    "scoring.executor": f"{_SHOWN}test_questions_go_by_the_configured_executor",
    "scoring.num_reference_images": f"{_SHOWN}test_as_many_references_are_shown_as_configured",
    "scoring.max_side": f"{_SHOWN}test_pictures_are_shown_no_larger_than_configured",
    "scoring.num_repeats": f"{_SHOWN}test_as_many_questions_are_asked_as_configured",
    "scoring.num_repeated": f"{_SHOWN}test_as_many_questions_are_asked_as_configured",
    "scoring.num_controls": f"{_SHOWN}test_as_many_questions_are_asked_as_configured",
    "scoring.num_pairs": f"{_SHOWN}test_as_many_questions_are_asked_as_configured",
    "scoring.num_checkpoint_pairs": f"{_JUDGE}test_kept_weights_meet_each_other_in_both_orders_and_are_ranked",
    "scoring.disagreement_threshold": f"{_JUDGE}test_a_second_judge_that_differs_much_is_a_dispute_too",
    "scoring.second_judge_fraction": f"{_JUDGE}test_a_second_judge_and_a_person_are_compared_with_the_first",
    "scoring.labels": f"{_SHOWN}test_a_persons_labels_are_read_where_they_are_configured",
    "scoring.poll_seconds": f"{_SHOWN}test_a_batch_job_is_polled_and_waited_for_as_configured",
    "scoring.max_wait_seconds": f"{_SHOWN}test_a_batch_job_is_polled_and_waited_for_as_configured",
    "scoring.deadline_seconds": f"{_SHOWN}test_a_late_batch_job_is_cancelled_as_configured",
    "scoring.max_failed_share": "tasks/services/llm/chat/test_retries.py::"
    "test_a_judge_that_answers_nonsense_is_not_asked_to_the_end",
    "publishing.is_registered": f"{_RUN}test_no_model_is_registered_where_it_is_configured",
    "publishing.title": f"{_RUN}test_the_report_has_the_configured_title",
    "diffusion.family": f"{_DIFFUSION}test_a_model_is_opened_as_the_configured_family",
    "diffusion.pretrained_model_name_or_path": f"{_DIFFUSION}test_the_configured_model_is_opened",
    "diffusion.revision": f"{_DIFFUSION}test_a_repository_is_taken_at_its_pinned_commit",
    "diffusion.resolution": f"{_DIFFUSION}test_pictures_have_the_configured_resolution",
    "diffusion.sampler": f"{_DIFFUSION}test_pictures_are_sampled_as_configured",
    "diffusion.precision": f"{_DIFFUSION}test_pictures_are_sampled_as_configured",
    "diffusion.device": f"{_DIFFUSION}test_a_device_that_is_not_there_is_refused",
    "llm.models": f"{_SERVICES}test_roles_without_a_profile_of_their_own_are_served_by_the_general_one",
    "llm.inspector": _ROLE,
    "llm.captioner": _ROLE,
    "llm.profiler": _ROLE,
    "llm.adjudicator": _ROLE,
    "llm.judge": _ROLE,
    "llm.second_judge": _ROLE,
    "llm.reviewer": _ROLE,
    "llm.budget_usd": "conf/test_trust.py::test_a_request_may_lower_the_operators_cap_on_money_and_not_lift_it",
    "llm.max_repair_fraction": "tasks/services/llm/chat/test_retries.py::"
    "test_repairs_are_bounded_for_all_questions_together",
    "llm.profiles": _ROLE,
    "store.kind": f"{_BUCKET}",
    "store.folder": f"{_SERVICES}test_objects_lie_where_the_store_is_configured",
    "store.bucket": "tasks/services/test_store.py::test_a_missing_bucket_is_named",
    "store.prefix": _BUCKET,
    "store.endpoint_url": _BUCKET,
    "store.region": _CLIENT,
    "store.request_checksums": _CLIENT,
    "tracking.kind": f"{_SERVICES}test_nothing_is_tracked_where_tracking_is_off",
    "tracking.also": "tasks/services/tracking/test_loggers.py::test_several_trackers_are_told_the_same",
    "tracking.wandb_mode": "tasks/services/tracking/test_loggers.py::test_wandb_needs_a_key_only_online",
    "tracking.uri": _DATABASE,
    "tracking.experiment": _DATABASE,
    "tracking.registered_model": f"{_RUN}test_the_model_is_registered_under_the_configured_name",
}

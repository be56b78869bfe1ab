// Written by `python -m builder.contract` from the worker's models. Do not edit.

export const CONTRACT_VERSION = "1.0";

/** Which family serves which job type. */
export const FAMILY_OF = {
  "sdxl_image_fast": "sdxl",
  "sdxl_image_high": "sdxl",
  "chat_enhance": "chat",
  "chat_conversation": "chat",
  "chat_unrestricted": "chat",
  "image_fast": "wan",
  "image_high": "wan",
  "video_fast": "wan",
  "video_high": "wan",
  "image7b_fast_enhanced": "wan",
  "image7b_high_enhanced": "wan",
  "video7b_fast_enhanced": "wan",
  "video7b_high_enhanced": "wan",
  "admin_utilities": "admin"
} as const;

/** Other names of two of them, which the application's payloads use. */
export const SYNONYMS = {
  "wan_video_fast": "video_fast",
  "wan_video_high": "video_high"
} as const;

export const FAMILIES = ["sdxl", "chat", "wan", "admin"] as const;

export type JobType = keyof typeof FAMILY_OF;

export type Family = (typeof FAMILIES)[number];

/** A LoRA by name, from the worker's own folder, or by the URL of an allowed host. */
export interface Lora {
  name?: string | null;
  url?: string | null;
  scale?: number;
  /** made for few steps: LCM, Lightning, Hyper, DMD2; allows 1 step and more */
  distilled?: boolean;
}

export interface SdxlConfig {
  num_images?: number | null;
  loras?: Lora[] | null;
  guidance_scale?: number | null;
  /** 1024x1024 */
  resolution?: string | null;
  seed?: number | null;
  negative_prompt?: string | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  image?: string | null;
  denoise_strength?: number | null;
  scheduler?: "euler" | "euler_a" | "dpmpp_2m" | "dpmpp_2m_karras" | "dpmpp_sde" | "unipc" | "ddim" | "lcm" | null;
  clip_skip?: number | null;
  resize_mode?: "crop" | "pad" | "stretch" | "extend" | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  mask?: string | null;
  mask_blur?: number | null;
  reference_required?: boolean | null;
  output_format?: "png" | "jpeg" | "webp" | null;
  quality?: number | null;
  upload_urls?: string[] | null;
  inline?: boolean | null;
  speed?: "exact" | "balanced" | "fast" | null;
  num_inference_steps?: number | null;
  /** the same as config.num_inference_steps */
  steps?: number | null;
}

export interface SdxlMetadata {
  negative_prompt?: string | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  reference_image_url?: string | null;
  reference_strength?: number | null;
  reference_type?: "style" | "composition" | "character" | null;
  denoise_strength?: number | null;
  exact_copy_mode?: boolean | null;
  reference_mode?: string | null;
  reference_consent?: boolean | null;
  nsfw_optimization?: boolean | null;
  contentType?: string | null;
  [key: string]: unknown;
}

export interface SdxlJob {
  /** RunPod's own id serves where it is missing */
  id?: string;
  type: "sdxl_image_fast" | "sdxl_image_high";
  user_id?: string | null;
  callback_url?: string | null;
  prompt?: string | null;
  negative_prompt?: string | null;
  content_type?: string | null;
  compel_enabled?: boolean | null;
  compel_weights?: string | null;
  config?: SdxlConfig | null;
  metadata?: SdxlMetadata | null;
  /** needed where the worker has WORKER_API_KEY */
  api_key?: string | null;
  /** the same as id */
  job_id?: string | null;
  /** the same as type, which wins */
  job_type?: string | null;
}

export interface ChatConfig {
  system_prompt?: string | null;
  job_type?: string | null;
  /** the same as model */
  model?: "qwen_instruct" | "qwen_base" | null;
  /** the same as max_tokens */
  max_tokens?: number | null;
  /** the same as temperature */
  temperature?: number | null;
  /** the same as top_p */
  top_p?: number | null;
  /** the same as top_k */
  top_k?: number | null;
  /** the same as min_p */
  min_p?: number | null;
  /** the same as presence_penalty */
  presence_penalty?: number | null;
  /** the same as frequency_penalty */
  frequency_penalty?: number | null;
  /** the same as repetition_penalty */
  repetition_penalty?: number | null;
  /** the same as logit_bias */
  logit_bias?: Record<string, unknown> | null;
  /** the same as stop */
  stop?: string | string[] | null;
  /** the same as seed */
  seed?: number | null;
  /** the same as response_format */
  response_format?: ResponseFormat | null;
}

export interface ChatMetadata {
  unrestricted_mode?: boolean | null;
  nsfw_optimization?: boolean | null;
  [key: string]: unknown;
}

export interface JsonSchema {
  schema: Record<string, unknown>;
}

export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

/** What the reply must parse as, in OpenAI's words; the bare `type` is enough. */
export interface ResponseFormat {
  type?: "text" | "json_object" | "json_schema";
  json_schema?: JsonSchema | null;
}

export interface ChatJob {
  /** RunPod's own id serves where it is missing */
  id?: string;
  type: "chat_enhance" | "chat_conversation" | "chat_unrestricted";
  user_id?: string | null;
  callback_url?: string | null;
  messages?: Message[] | null;
  prompt?: string | null;
  config?: ChatConfig | null;
  metadata?: ChatMetadata | null;
  content_tier?: string | null;
  content_type?: string | null;
  sfw_mode?: boolean | null;
  stream?: boolean | null;
  truncate?: "oldest" | null;
  thinking?: boolean | null;
  model?: "qwen_instruct" | "qwen_base" | null;
  max_tokens?: number | null;
  temperature?: number | null;
  top_p?: number | null;
  top_k?: number | null;
  min_p?: number | null;
  presence_penalty?: number | null;
  frequency_penalty?: number | null;
  repetition_penalty?: number | null;
  logit_bias?: Record<string, unknown> | null;
  stop?: string | string[] | null;
  seed?: number | null;
  response_format?: ResponseFormat | null;
  /** needed where the worker has WORKER_API_KEY */
  api_key?: string | null;
  /** the same as id */
  job_id?: string | null;
  /** the same as type, which wins */
  job_type?: string | null;
}

export interface WanConfig {
  width?: number | null;
  height?: number | null;
  resolution?: string | null;
  aspect_ratio?: string | null;
  frames?: number | null;
  duration?: number | null;
  fps?: number | null;
  num_images?: number | null;
  guidance_scale?: number | null;
  flow_shift?: number | null;
  sample_solver?: string | null;
  seed?: number | null;
  negative_prompt?: string | null;
  enhancement_system_prompt?: string | null;
  reference_mode?: "none" | "single" | "start" | "end" | "both" | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  image?: string | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  first_frame?: string | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  last_frame?: string | null;
  single_mode?: "first_frame" | "subject" | null;
  denoise_strength?: number | null;
  resize_mode?: "crop" | "pad" | "stretch" | null;
  reference_required?: boolean | null;
  upload_urls?: string[] | null;
  speed?: "exact" | "balanced" | "fast" | null;
  num_inference_steps?: number | null;
  /** the same as config.num_inference_steps */
  steps?: number | null;
}

export interface WanMetadata {
  negative_prompt?: string | null;
  aspect_ratio?: string | null;
  duration?: number | null;
  video_reference_mode?: "none" | "single" | "start" | "end" | "both" | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  reference_image_url?: string | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  start_reference_url?: string | null;
  /** a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync */
  end_reference_url?: string | null;
  reference_strength?: number | null;
  denoise_strength?: number | null;
  reference_consent?: boolean | null;
  nsfw_optimization?: boolean | null;
  contentType?: string | null;
  [key: string]: unknown;
}

export interface WanJob {
  /** RunPod's own id serves where it is missing */
  id?: string;
  type: "image_fast" | "image_high" | "video_fast" | "video_high" | "image7b_fast_enhanced" | "image7b_high_enhanced" | "video7b_fast_enhanced" | "video7b_high_enhanced";
  user_id?: string | null;
  callback_url?: string | null;
  prompt?: string | null;
  negative_prompt?: string | null;
  content_type?: string | null;
  config?: WanConfig | null;
  metadata?: WanMetadata | null;
  /** needed where the worker has WORKER_API_KEY */
  api_key?: string | null;
  /** the same as id */
  job_id?: string | null;
  /** the same as type, which wins */
  job_type?: string | null;
}

export interface AdminConfig {
  operation?: "health" | "status" | "info" | "memory_status" | "memory_report" | "memory_load" | "memory_unload" | "force_unload" | "predictive_load" | "pressure_check" | "debug_env" | "enhancement_info" | "job_status" | null;
  target_worker?: string | null;
  force?: boolean | null;
  job_id?: string | null;
  user_id?: string | null;
}

export interface AdminJob {
  /** RunPod's own id serves where it is missing */
  id?: string;
  type: "admin_utilities";
  user_id?: string | null;
  callback_url?: string | null;
  config?: AdminConfig | null;
  /** the same as config.operation */
  operation?: "health" | "status" | "info" | "memory_status" | "memory_report" | "memory_load" | "memory_unload" | "force_unload" | "predictive_load" | "pressure_check" | "debug_env" | "enhancement_info" | "job_status" | null;
  /** the same as config.target_worker */
  target_worker?: string | null;
  /** the same as config.force */
  force?: boolean | null;
  /** needed where the worker has WORKER_API_KEY */
  api_key?: string | null;
  /** the same as id */
  job_id?: string | null;
  /** the same as type, which wins */
  job_type?: string | null;
}

export interface RunRequest {
  /** a payload: the schemas in jobs/ */
  input: Record<string, unknown>;
  /** RunPod's top-level `s3Config`: the job's own bucket, which wins over the worker's. What no store could take is refused here, before anything is computed for it. */
  s3Config?: Record<string, unknown>;
}

/** One output. `url` is a path in the bucket, a link, or a `data:` URI with the whole file. */
export interface Asset {
  type: "image" | "video" | "text";
  url: string;
  thumbnail_url?: string | null;
  metadata: AssetMetadata;
  [key: string]: unknown;
}

/** Pictures and videos have sizes and seeds, texts have not. `marks` are what the worker's classifiers see in a picture, by its rules. */
export interface AssetMetadata {
  format: string;
  batch_size: number;
  asset_index: number;
  file_size_bytes: number;
  width?: number | null;
  height?: number | null;
  seed?: number | null;
  steps?: number | null;
  num_inference_steps?: number | null;
  guidance_scale?: number | null;
  denoise_strength?: number | null;
  frame_num?: number | null;
  fps?: number | null;
  duration_seconds?: number | null;
  marks?: string[] | null;
  [key: string]: unknown;
}

/** What the worker knows of the whole job; `timings` are seconds by stage. `cost` is the job's share of the device's time, in the currency of `GPU_PRICE_PER_SECOND`. `refused` has the `asset_index` of each picture that was made and is not delivered. Of a video `frame_num` is its seconds times 16, whatever its `fps`: the asset's `frame_num` is the number of frames in the file. */
export interface DocumentMetadata {
  processing_time?: number | null;
  timings?: Record<string, number> | null;
  versions?: Record<string, string> | null;
  reference_mode?: string | null;
  batch_size?: number | null;
  frame_num?: number | null;
  fps?: number | null;
  vram_used?: number | null;
  cost?: number | null;
  refused?: number[] | null;
  warnings?: string[] | null;
  error_type?: "CANCELLED" | "CONTENT_REFUSED" | "INTERNAL_ERROR" | "INVALID_PROMPT" | "MODEL_LOAD_ERROR" | "OOM_ERROR" | "RATE_LIMITED" | "REFERENCE_FRAME_ERROR" | "TIMEOUT_ERROR" | "UNAUTHORIZED" | "UPLOAD_ERROR" | "WORKER_UNAVAILABLE" | null;
  model?: string | null;
  engine?: string | null;
  system_prompt_used?: string | null;
  enhancement_source?: string | null;
  unrestricted_mode?: boolean | null;
  nsfw_optimization?: boolean | null;
  [key: string]: unknown;
}

/** Why a job failed; `retryable` says whether the same job may succeed later. */
export interface Failure {
  code: "CANCELLED" | "CONTENT_REFUSED" | "INTERNAL_ERROR" | "INVALID_PROMPT" | "MODEL_LOAD_ERROR" | "OOM_ERROR" | "RATE_LIMITED" | "REFERENCE_FRAME_ERROR" | "TIMEOUT_ERROR" | "UNAUTHORIZED" | "UPLOAD_ERROR" | "WORKER_UNAVAILABLE";
  message: string;
  retryable: boolean;
  retry_after?: number | null;
  [key: string]: unknown;
}

/** Tokens of a chat. */
export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_reused: number;
  [key: string]: unknown;
}

/** The body that is posted, signed, to the application. */
export interface Callback {
  job_id: string;
  worker_id: string;
  status: "processing" | "completed" | "failed";
  assets: Asset[];
  metadata: DocumentMetadata;
  error_message?: string | null;
  response?: string | null;
  enhanced_prompt?: string | null;
  finish_reason?: "stop" | "length" | null;
  usage?: Usage | null;
  result?: Record<string, unknown> | null;
  error?: Failure | null;
  [key: string]: unknown;
}

/** What RunPod shows as `output`; a failed job's `error` is this `failure` as JSON text. */
export interface Result {
  job_id: string;
  worker_id: string;
  status: "processing" | "completed" | "failed";
  assets: Asset[];
  metadata: DocumentMetadata;
  error_message?: string | null;
  response?: string | null;
  enhanced_prompt?: string | null;
  finish_reason?: "stop" | "length" | null;
  usage?: Usage | null;
  result?: Record<string, unknown> | null;
  failure?: Failure | null;
  [key: string]: unknown;
}

/** One item of a streamed reply; the last item of a stream is a Result. */
export interface Delta {
  delta: string;
  [key: string]: unknown;
}

export type Job = SdxlJob | ChatJob | WanJob | AdminJob;

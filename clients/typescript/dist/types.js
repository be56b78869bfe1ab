// Written by `python -m builder.contract` from the worker's models. Do not edit.
export const CONTRACT_VERSION = "1.0";
/** Which family serves which job type. */ export const FAMILY_OF = {
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
};
/** Other names of two of them, which the application's payloads use. */ export const SYNONYMS = {
  "wan_video_fast": "video_fast",
  "wan_video_high": "video_high"
};
export const FAMILIES = [
  "sdxl",
  "chat",
  "wan",
  "admin"
];

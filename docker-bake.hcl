# docker buildx bake                  the images of all families
# docker buildx bake sdxl --load      one of them, for this machine
# docker buildx bake chat-vllm        chat by vLLM, on vLLM's own image
# CUDA=12.8 docker buildx bake        for hosts with older drivers
# REGISTRY=ghcr.io/me VERSION=0.1.0 docker buildx bake --push
#
# Set a variable in the environment. `--set sdxl.args.BASE_IMAGE=...` sets any other argument of the
# Dockerfile.

# The registry for images, such as ghcr.io/me.
variable "REGISTRY" {
  default = ""
}

# 13.0, or 12.8 for hosts with older drivers, whose tags end with -cuda12.8.
variable "CUDA" {
  default = "13.0"
}

# The tag and the label of the images.
variable "VERSION" {
  default = "dev"
}

# 1 adds each family's default weights. HF_TOKEN, if it is set, is passed as a secret.
variable "BAKE" {
  default = "0"
}

# 1 adds a C compiler, for COMPILE=regional.
variable "COMPILER" {
  default = "0"
}

# 1 adds the packages that sign assets with Content Credentials.
variable "C2PA" {
  default = "0"
}

# An index with another build of torch, such as https://download.pytorch.org/whl/cpu.
variable "TORCH_INDEX" {
  default = ""
}

# The commit, for the label.
variable "REVISION" {
  default = ""
}

# The repository's URL, for the label.
variable "SOURCE" {
  default = ""
}

function "tags" {
  params = [family]
  result = ["${REGISTRY == "" ? "" : "${REGISTRY}/"}ourvidz-${family}:${VERSION}${CUDA == "13.0" ? "" : "-cuda${CUDA}"}"]
}

group "default" {
  targets = ["all"]
}

group "all" {
  targets = ["sdxl", "chat", "wan"]
}

target "image" {
  args = {
    BAKE        = BAKE
    C2PA        = C2PA
    COMPILER    = COMPILER
    CUDA        = CUDA
    TORCH_INDEX = TORCH_INDEX
    VERSION     = VERSION
    REVISION    = REVISION
    SOURCE      = SOURCE
  }
  secret = ["id=HF_TOKEN,env=HF_TOKEN"]
}

target "sdxl" {
  inherits = ["image"]
  args     = { FAMILY = "sdxl" }
  tags     = tags("sdxl")
}

target "chat" {
  inherits = ["image"]
  args     = { FAMILY = "chat" }
  tags     = tags("chat")
}

target "wan" {
  inherits = ["image"]
  args     = { FAMILY = "wan" }
  tags     = tags("wan")
}

# Not in a group, since it is much larger than the others: most of it is vLLM's image. For another version of
# vLLM: `--set chat-vllm.args.VLLM_IMAGE=vllm/vllm-openai:TAG`; the tag decides which CUDA it is.
target "chat-vllm" {
  inherits = ["image"]
  target   = "chat-vllm"
  args     = { FAMILY = "chat" }
  tags     = ["${REGISTRY == "" ? "" : "${REGISTRY}/"}ourvidz-chat-vllm:${VERSION}"]
}

{{- /*
    The command of a pod that is the first of the release's image: it says so if the image has no genvalues, as AWS's own
    containers. Kubernetes alone reports a container that cannot start, and no log. Arguments: root, command (a list).
    JSON.
*/}}
{{- define "llama-lora.first-command" -}}
{{- $not := printf "The image %s has no genvalues: it is not built from trainer/Dockerfile." (include "llama-lora.image" .root) }}
{{- $script := printf "command -v \"$0\" >/dev/null || { echo '%s Build and push one: genvalues image push (docs/image.md).' >&2; exit 2; }; exec \"$0\" \"$@\"" $not }}
{{- concat (list "sh" "-c" $script) .command | toJson }}
{{- end }}

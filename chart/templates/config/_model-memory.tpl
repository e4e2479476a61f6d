{{- /* Sets the memory of the stages that compute with the model on a CPU node, where the values have none: see
       genvalues/accelerators/cpu_memory.py. Where the values have only the request or only the limit, the other one is not beyond it. */}}
{{- define "llama-lora.models.complete" -}}
{{- $models := include "llama-lora.models" . | fromJson }}
{{- range $stage, $usual := get $models .Values.model.id | default (get $models "") }}
{{- $settings := get $.Values.stages $stage }}
{{- $resources := $settings.resources | default dict }}
{{- $request := get ($resources.requests | default dict) "memory" }}
{{- $limit := get ($resources.limits | default dict) "memory" }}
{{- if not $request }}
{{- $request = $usual.requests }}
{{- if and $limit (gt (include "llama-lora.quantity" $request | float64) (include "llama-lora.quantity" $limit | float64)) }}
{{- $request = $limit }}
{{- end }}
{{- end }}
{{- if not $limit }}
{{- $limit = $usual.limits }}
{{- if gt (include "llama-lora.quantity" $request | float64) (include "llama-lora.quantity" $limit | float64) }}
{{- $limit = $request }}
{{- end }}
{{- end }}
{{- $_ := set $settings "resources" (mergeOverwrite (dict) $resources (dict "requests" (dict "memory" $request) "limits" (dict "memory" $limit))) }}
{{- end }}
{{- end }}

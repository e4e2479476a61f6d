{{- /* Sets the memory of the stages that compute with the model on a CPU node, where the values have none: see
       genvalues/accelerators/cpu_memory.py. */}}
{{- define "llama-lora.models.complete" -}}
{{- $models := include "llama-lora.models" . | fromJson }}
{{- range $stage, $usual := get $models .Values.model.id | default (get $models "") }}
{{- $settings := get $.Values.stages $stage }}
{{- $written := dict }}
{{- range $bound, $amounts := $settings.resources }}
{{- $amounts = $amounts | default dict }}
{{- $_ := set $written $bound (ternary (omit $amounts "memory") $amounts (empty $amounts.memory)) }}      {{- /* null: as usual */}}
{{- end }}
{{- $memory := dict "requests" (dict "memory" $usual.requests) "limits" (dict "memory" $usual.limits) }}
{{- $_ := set $settings "resources" (include "llama-lora.instance.resources" (dict "usual" $memory "written" $written) | fromJson) }}
{{- end }}
{{- end }}

{{- /* Completes .Values in place: restores missing defaults (a null took them away, or `helm upgrade --reuse-values` kept the
       values of a chart that lacks them), replaces other words for values, such as backend neuron, by the present ones, and
       turns numbers that `helm --set` passed as text into numbers. */}}
{{- define "llama-lora.settings.complete" -}}
{{- if not (kindIs "map" .Values.storage) }}      {{- /* the subchart's values are another map by now */}}
{{- fail "invalid values:\n\n  storage is missing. Remove storage: null, or upgrade with --reset-then-reuse-values.\n" }}
{{- end }}
{{- include "llama-lora.settings.restore" (dict "values" .Values "defaults" (include "llama-lora.settings.defaults" . | fromJson)) }}
{{- range $key, $words := include "llama-lora.settings.words" . | fromJson }}
{{- $path := splitList "." $key }}
{{- $block := $.Values }}
{{- range initial $path }}
{{- $block = get $block . }}
{{- end }}
{{- $written := get $block (last $path) | toString }}
{{- $_ := set $block (last $path) (get $words $written | default $written) }}
{{- end }}
{{- $mistakes := list }}
{{- range $key, $limits := include "llama-lora.settings.numbers" . | fromJson }}
{{- $path := splitList "." $key }}
{{- $block := $.Values }}
{{- range initial $path }}
{{- $block = get $block . }}
{{- end }}
{{- $written := get $block (last $path) }}
{{- if and $written (kindIs "string" $written) }}
{{- $number := float64 $written }}
{{- range $word, $limit := $limits }}
{{- if or (and (eq $word "minimum") (lt $number (float64 $limit))) (and (eq $word "exclusiveMinimum") (le $number (float64 $limit))) }}
{{- $mistakes = append $mistakes (printf "%s %s is too small. Set it to %s %v." $key $written (ternary "at least" "more than" (eq $word "minimum")) $limit) }}
{{- else if or (and (eq $word "maximum") (gt $number (float64 $limit))) (and (eq $word "exclusiveMaximum") (ge $number (float64 $limit))) }}
{{- $mistakes = append $mistakes (printf "%s %s is too large. Set it to %s %v." $key $written (ternary "at most" "less than" (eq $word "maximum")) $limit) }}
{{- end }}
{{- end }}
{{- $_ := set $block (last $path) $number }}
{{- end }}
{{- end }}
{{- if $mistakes }}
{{- fail (printf "invalid values:\n\n  %s\n" (join "\n  " $mistakes)) }}
{{- end }}
{{- end }}

{{- define "llama-lora.settings.restore" -}}
{{- range $key, $default := .defaults }}
{{- if not (hasKey $.values $key) }}
{{- $_ := set $.values $key $default }}
{{- else if and (kindIs "map" $default) (kindIs "map" (get $.values $key)) }}
{{- include "llama-lora.settings.restore" (dict "values" (get $.values $key) "defaults" $default) }}
{{- end }}
{{- end }}
{{- end }}

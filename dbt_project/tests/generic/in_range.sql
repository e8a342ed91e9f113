{% test in_range(model, column_name, at_least=none, at_most=none) %}
    {#- Values below `at_least` or above `at_most`; both ends belong to the range, and NULL passes. -#}
    select {{ column_name }}
    from {{ model }}
    where false
    {%- if at_least is not none %} or {{ column_name }} < {{ at_least }}{% endif %}
    {%- if at_most is not none %} or {{ column_name }} > {{ at_most }}{% endif %}
{% endtest %}

with companies as (
    -- A film of several companies counts in full for each of them: the source does not say who got what.
    select
        movie_id,
        title,
        year,
        box_office_usd,
        -- 'Gracie Films, Inc.' is one company.
        unnest(list_distinct(string_split(regexp_replace(distributor, ', (Inc|LLC|Ltd)\b', ' \1', 'g'), ', '))) as company
    from {{ ref('int_film') }}
    where status = 'released' and distributor is not null
)

select
    company,
    count(distinct movie_id)::integer as film_count,
    count(box_office_usd)::integer as film_with_box_office_count,
    sum(box_office_usd)::decimal(18, 2) as box_office_usd,
    avg(box_office_usd)::decimal(18, 2) as mean_box_office_usd,
    first(title order by box_office_usd desc nulls last, movie_id) as top_film,
    min(year)::smallint as first_year,
    max(year)::smallint as last_year
from companies
group by company
order by company

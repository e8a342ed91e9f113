select
    credit.credit_id,
    credit.movie_id,
    credit.person_id,
    person.name,
    credit.role,
    credit.billing,
    film.title,
    film.year,
    film.status,
    film.tomato_rating,
    film.oscars,
    film.box_office_usd
from {{ ref('stg_credit') }} as credit
inner join {{ ref('stg_person') }} as person on person.person_id = credit.person_id
inner join {{ ref('int_film') }} as film on film.movie_id = credit.movie_id

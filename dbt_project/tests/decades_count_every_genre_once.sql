-- The films over all decades and genres are the genres of all released films with a year.
with expected as (
    select count(*) as film_count
    from {{ ref('stg_movie_genre') }} as movie_genre
    inner join {{ ref('stg_movie') }} as movie on movie.movie_id = movie_genre.movie_id
    where movie.status = 'released' and movie.year is not null
),

found as (
    select coalesce(sum(film_count), 0) as film_count
    from {{ ref('films_by_decade_and_genre') }}
)

select expected.film_count as expected, found.film_count as found
from expected
cross join found
where expected.film_count <> found.film_count
